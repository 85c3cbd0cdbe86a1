# SPDX-License-Identifier: Apache-2.0
"""µVMs: guests that were booted once, and are resumed as new servers.

Formats and pure code; see reference/microvm. Neither libvirt nor nova is
imported here.
"""
