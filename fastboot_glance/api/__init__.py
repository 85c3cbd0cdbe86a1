# SPDX-License-Identifier: Apache-2.0
"""The HTTP API: what people ask and tell fastboot. See reference/api.

One module per resource, its rules in :mod:`~fastboot_glance.api.policy`; it
keeps nothing itself. The journal says what images there are, the records
what builders and hosts say of them.
"""
