# SPDX-License-Identifier: Apache-2.0
"""Guests that stood still already when their owner paused them.

libvirt does nothing then, and its reason stays the I/O error, for which the
agent lets guests go on (libvirt 9.0, qemuDomainSuspend). So the running
domain is marked.
"""

from typing import Any, Final
from xml.etree import ElementTree

_NAMESPACE: Final = 'urn:openstack:fastboot'
_ELEMENT: Final = 'paused'
#: libvirt's numbers; not every host that has this package has libvirt.
_METADATA_ELEMENT: Final = 2
_LIVE: Final = 1
_CONFIG: Final = 2
_PAUSED: Final = 3
_IO_ERROR: Final = 5
#: State and reason of a guest that waits for its disk.
WAITING: Final = [_PAUSED, _IO_ERROR]


def mark(domain: Any) -> None:
    """Say that its owner wants it to stand still.

    :raises libvirt.libvirtError: it does not run.
    """
    domain.setMetadata(_METADATA_ELEMENT, f'<{_ELEMENT}/>', 'fastboot',
                       _NAMESPACE, _LIVE)


def unmark(domain: Any) -> None:
    """Forget that.

    Also in what is defined: Nova defines what runs when it swaps a volume.

    :raises libvirt.libvirtError: it does not run.
    """
    domain.setMetadata(_METADATA_ELEMENT, None, None, _NAMESPACE,
                       _LIVE | (_CONFIG if domain.isPersistent() else 0))


def is_marked(tree: ElementTree.Element) -> bool:
    """Whether its owner wants it to stand still.

    :param tree: what libvirt says of the running domain.
    """
    return tree.find(f'metadata/{{{_NAMESPACE}}}{_ELEMENT}') is not None
