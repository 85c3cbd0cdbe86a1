# SPDX-License-Identifier: Apache-2.0
"""A config drive as small as cloud-init accepts it.

It makes a guest behave as a new instance of OpenStack: a new id, a host name
and no network. It carries no keys and no user's data.
"""

import io
import json
import pathlib
import uuid
from typing import Final

import pycdlib

_LABEL: Final = 'config-2'
_USER_DATA: Final = b'#cloud-config\n{}\n'


def build(path: pathlib.Path, hostname: str = 'fastboot',
          user_data: bytes = _USER_DATA) -> None:
    """Write an ISO image with a new instance's metadata.

    :param path: the file to make or overwrite.
    :param user_data: what cloud-init runs.
    """
    meta_data = {
        'uuid': str(uuid.uuid4()), 'name': hostname, 'hostname': hostname,
        'launch_index': 0, 'availability_zone': 'nova',
    }
    network: dict[str, list[str]] = {
        'links': [], 'networks': [], 'services': []}
    files = {
        'meta_data.json': json.dumps(meta_data).encode(),
        'network_data.json': json.dumps(network).encode(),
        'user_data': user_data,
    }
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
