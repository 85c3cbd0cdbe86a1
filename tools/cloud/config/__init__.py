# SPDX-License-Identifier: Apache-2.0
"""Every configuration file of the sandbox."""

import pathlib

from cloud.config import fastboot, glance, identity, neutron, nova, proxy
from cloud.layout import Layout


def files(layout: Layout) -> dict[pathlib.Path, str]:
    """Path and text of each; empty text: the file must not exist."""
    etc = layout.etc
    texts = {
        etc / 'keystone/keystone.conf': identity.keystone(layout),
        etc / 'placement/placement.conf': identity.placement(layout),
        etc / 'glance/glance-api.conf': glance.api(layout),
        etc / 'glance/glance-image-import.conf':
            glance.image_import(layout),
        etc / 'neutron/neutron.conf': neutron.server(layout),
        etc / 'nova/nova.conf': nova.central(layout),
        etc / 'fastboot/fastboot.conf': fastboot.central(layout),
        etc / 'fastboot/policy.yaml': fastboot.policy(),
        etc / 'fastboot/nginx.conf': fastboot.nginx(layout),
        etc / 'proxy/machine.cfg': proxy.machine(layout),
        etc / 'rabbitmq/rabbitmq.conf': 'loopback_users = none\n',
        layout.openrc: identity.openrc(layout),
        layout.clouds: identity.clouds(layout),
    }
    for node in layout.hosts:
        name, home = node.name, layout.home(node)
        texts |= {
            etc / f'neutron/agents-{name}.conf':
                neutron.agents(layout, node),
            etc / f'nova/compute-{name}.conf': nova.compute(layout, node),
            etc / f'fastboot/agent-{name}.conf':
                fastboot.agent(layout, node),
            etc / f'proxy/{name}.cfg': proxy.host(layout, node),
            home / 'libvirt-etc/libvirtd.conf': nova.libvirtd(node),
            home / 'libvirt-etc/qemu.conf': nova.qemu(node),
            home / 'libvirt-etc/hooks/qemu': nova.hook(),
            etc / f'ssh/{name}': nova.sshd(layout, node),
        }
    return texts


def write(layout: Layout) -> None:
    """Write them all, readable to root only: there are passwords."""
    for path, text in files(layout).items():
        if not text:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + '.new')
        new.touch(mode=0o640)
        new.write_text(text)
        if text.startswith('#!'):
            new.chmod(0o750)
        new.rename(path)
