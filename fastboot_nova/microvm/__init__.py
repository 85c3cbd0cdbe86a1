# SPDX-License-Identifier: Apache-2.0
"""µVMs on a compute host: resumed through libvirt. Nova is not imported."""
