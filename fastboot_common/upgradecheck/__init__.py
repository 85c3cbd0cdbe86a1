# SPDX-License-Identifier: Apache-2.0
"""``fastboot-status``: is this machine set up as it should be?"""
