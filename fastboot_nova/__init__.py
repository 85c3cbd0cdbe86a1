# SPDX-License-Identifier: Apache-2.0
"""The compute host's side: the volume, its upkeep and its guests."""
