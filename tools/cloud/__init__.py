# SPDX-License-Identifier: Apache-2.0
"""The sandbox cloud: a real OpenStack on one machine, for tests and demos.

Not an installer: passwords are constants, and everything runs as root
below one state directory, in namespaces of its own. The standard library
is all that this package needs.
"""
