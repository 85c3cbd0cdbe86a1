# SPDX-License-Identifier: Apache-2.0
"""The builder's side: capture of an image's boot working set."""
