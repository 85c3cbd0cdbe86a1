# SPDX-License-Identifier: Apache-2.0
"""A config drive as small as cloud-init accepts it.

It makes a guest behave as a new instance of OpenStack: a new id, a host
name, a key and a network. The key is nobody's, and the network's address
leads nowhere; a fixed one, as nobody answers DHCP there.
"""

import base64
import hashlib
import io
import json
import pathlib
import uuid
from typing import Final

import pycdlib

#: Of the interface that the network is on.
MAC: Final = 'fa:16:3e:00:00:01'
#: For documentation (RFC 5737), so that no site has it.
_NETWORK: Final = {
    'links': [{'id': 'tap0', 'type': 'ovs', 'mtu': 1500,
               'ethernet_mac_address': MAC, 'vif_id': 'tap0'}],
    'networks': [{
        'id': 'network0', 'type': 'ipv4', 'link': 'tap0',
        'ip_address': '192.0.2.10', 'netmask': '255.255.255.0',
        'network_id': 'network0',
        'routes': [{'network': '0.0.0.0', 'netmask': '0.0.0.0',  # noqa: S104
                    'gateway': '192.0.2.1'}]}],
    'services': [{'type': 'dns', 'address': '192.0.2.1'}],
}
#: A public key that nobody has a private one for. Not zeros: they are a
#: point for which some verifiers take signatures that anybody can make.
_KEY: Final = 'ssh-ed25519 ' + base64.b64encode(
    b'\0\0\0\x0bssh-ed25519\0\0\0\x20'
    + hashlib.sha256(b'fastboot').digest()).decode() + ' fastboot'
_LABEL: Final = 'config-2'
_USER_DATA: Final = b'#cloud-config\n{}\n'


def build(path: pathlib.Path, hostname: str = 'fastboot',
          user_data: bytes = _USER_DATA, *, plain: bool = False) -> None:
    """Write an ISO image with a new instance's metadata.

    :param path: the file to make or overwrite.
    :param user_data: what cloud-init runs.
    :param plain: without interface, and without key: for guests that have
        no such interface, where cloud-init would fail, and for those whose
        disk is kept.
    """
    meta_data = {
        'uuid': str(uuid.uuid4()), 'name': hostname, 'hostname': hostname,
        'launch_index': 0, 'availability_zone': 'nova',
        'public_keys': {} if plain else {'fastboot': _KEY},
    }
    files = {
        'meta_data.json': json.dumps(meta_data).encode(),
        'user_data': user_data,
    }
    if not plain:
        files['network_data.json'] = json.dumps(_NETWORK).encode()
    iso = pycdlib.PyCdlib()
    iso.new(vol_ident=_LABEL, joliet=3, rock_ridge='1.09')
    iso.add_directory('/OPENSTAC', rr_name='openstack',
                      joliet_path='/openstack')
    iso.add_directory('/OPENSTAC/LATEST', rr_name='latest',
                      joliet_path='/openstack/latest')
    for number, (name, data) in enumerate(files.items()):
        # ISO 9660 level 1 names are 8.3; guests see the other two.
        iso.add_fp(io.BytesIO(data), len(data),
                   f'/OPENSTAC/LATEST/FILE{number}.;1', rr_name=name,
                   joliet_path=f'/openstack/latest/{name}')
    iso.write(str(path))
    iso.close()
