# SPDX-License-Identifier: Apache-2.0
"""``openstack fastboot …``: a plugin of python-openstackclient.

It talks to the HTTP API (reference/api) and needs nothing else of fastboot.
"""
