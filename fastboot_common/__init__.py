# SPDX-License-Identifier: Apache-2.0
"""Formats, repository, volume, export and trace: what all parts share."""
