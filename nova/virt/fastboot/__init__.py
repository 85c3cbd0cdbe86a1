# SPDX-License-Identifier: Apache-2.0
"""Where Nova looks for ``compute_driver = fastboot.FastbootLibvirtDriver``."""

from fastboot_nova.driver import FastbootLibvirtDriver

__all__ = ['FastbootLibvirtDriver']
