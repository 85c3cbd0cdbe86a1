# SPDX-License-Identifier: Apache-2.0
"""Nova's files: the central services', and nova-compute's of each host."""

from cloud.config.ini import (
    Sections,
    authtoken,
    client,
    login,
    merged,
    render,
)
from cloud.layout import (
    NOVA_DIR,
    PASSWORD,
    REGION,
    Layout,
    Node,
)

#: Every context in which Nova would call sudo.
_PRIVSEP = ('nova_sys_admin', 'privsep_osbrick', 'vif_plug_ovs_privileged',
            'vif_plug_linux_bridge_privileged')

#: Nova's default, and what builders say of an image.
NOT_FOR_SNAPSHOTS = (
    'cache_in_nova', 'bittorrent', 'fastboot_state', 'fastboot_version',
    'fastboot_boot_size', 'fastboot_size', 'fastboot_error',
    'fastboot_microvm', 'fastboot_microvm_error')


def _common(layout: Layout, node: Node) -> Sections:
    return {
        'DEFAULT': {
            'host': node.name,
            'my_ip': node.address,
            'transport_url': layout.bus,
            'concurrency_backend': 'threading',
            'periodic_fuzzy_delay': 0,
            'report_interval': 2,
            'service_down_time': 20,
            'graceful_shutdown_timeout': 4,
            'manager_shutdown_timeout': 2,
            'allow_resize_to_same_host': True,
            'ram_allocation_ratio': 4.0,
            'cpu_allocation_ratio': 16.0,
            'heal_instance_info_cache_interval': -1,
            'vif_plugging_is_fatal': True,
            'vif_plugging_timeout': 60,
        },
        'api': {'auth_strategy': 'keystone'},
        **authtoken(layout, 'nova'),
        'service_user': {**login(layout, 'nova'),
                         'send_service_user_token': True},
        'placement': client(layout, 'placement'),
        'neutron': {
            **client(layout, 'neutron'),
            'service_metadata_proxy': True,
            'metadata_proxy_shared_secret': PASSWORD,
        },
        'glance': {'region_name': REGION},
        'vnc': {'enabled': False},
        'spice': {'enabled': False},
        'oslo_concurrency': {'lock_path': '/run/nova'},
    }


def central(layout: Layout) -> str:
    """nova.conf."""
    fastboot: Sections = {
        'DEFAULT': {'non_inheritable_image_properties':
                    ','.join(NOT_FOR_SNAPSHOTS)},
    }
    return render(merged(_common(layout, layout.control), {
        'DEFAULT': {'state_path': '/run/nova'},
        'api_database': {'connection': layout.database('nova_api')},
        'database': {'connection': layout.database('nova')},
        'scheduler': {'workers': 1, 'discover_hosts_in_cells_interval': 2},
        'conductor': {'workers': 1},
    }, fastboot if layout.options.fastboot else {}))


def compute(layout: Layout, node: Node) -> str:
    """nova-compute.conf of a host; without any database."""
    file = layout.etc / 'nova' / f'compute-{node.name}.conf'
    helper = f'{layout.bin("privsep-helper")} --config-file {file}'
    fastboot: Sections = {
        'DEFAULT': {'compute_driver': 'fastboot.FastbootLibvirtDriver'},
        'libvirt': {'disk_cachemodes': 'file=writeback'},
        # Guests are slow without KVM, and several start at once.
        'fastboot': {'enabled': True, 'resume_deadline': 60},
    }
    return render(merged(_common(layout, node), {
        'DEFAULT': {
            'compute_driver': 'libvirt.LibvirtDriver',
            'state_path': NOVA_DIR,
        },
        'libvirt': {
            'virt_type': 'qemu',
            'cpu_mode': 'none',
            'images_type': 'qcow2',
            'connection_uri': 'qemu:///system',
            'live_migration_uri':
                f'qemu+unix:///system?socket={layout.state}/nodes/%s/'
                'libvirt/libvirt-sock',
        },
        **{context: {'helper_command': helper} for context in _PRIVSEP},
        'os_vif_ovs': {
            'ovsdb_connection': 'unix:/run/openvswitch/db.sock'},
        # os-vif makes taps for the kernel datapath only. Here libvirt makes
        # them, at the end of a migration: no network-vif-plugged comes
        # while Nova prepares the destination.
        'compute': {'live_migration_wait_for_vif_plug': False},
    }, fastboot if layout.options.fastboot else {}))


def libvirtd(node: Node) -> str:
    """libvirtd.conf."""
    return '\n'.join(['unix_sock_group = "root"', 'auth_unix_rw = "none"',
                      'auth_unix_ro = "none"', f'host_uuid = "{node.uuid}"',
                      ''])


def sshd(layout: Layout, node: Node) -> str:
    """sshd_config: a host lets the others copy disks to it."""
    return '\n'.join([
        f'ListenAddress {node.address}', f'HostKey {layout.key}',
        f'AuthorizedKeysFile {layout.key}.pub', 'PidFile none',
        'PermitRootLogin prohibit-password', 'PasswordAuthentication no',
        'UsePAM no', 'StrictModes no', 'Subsystem sftp internal-sftp', ''])


def qemu(node: Node) -> str:
    """libvirt's qemu.conf."""
    return '\n'.join([f'migration_host = "{node.address}"',
                      'cgroup_controllers = []', ''])


def hook() -> str:
    """libvirt's hook: what it calls when a guest has started.

    libvirt makes the taps here, and makes them anew when a guest is started
    again. The userspace datapath may go on with the old one's socket then
    (Open vSwitch 3.1): it has not made the new one promiscuous. Its port is
    made anew, so slowly that Neutron's agent, which looks every 2 seconds,
    sees it go and come. And when both change the new tap's flags at the same
    time, one's change is lost: if it is libvirt's, the tap is down.

    In a subshell: with a function dash keeps libvirt's pipes open, and
    libvirt waits for them, two seconds at each start.
    """
    return '''\
#!/bin/sh
[ "$2" = started ] || exit 0
taps=$(grep -o "dev='tap[0-9a-f-]*'" | cut -d "'" -f 2)
(
    sleep 2
    for tap in $taps; do
        ip link set "$tap" up
        ip link show "$tap" | grep -q PROMISC && continue
        ids=$(ovs-vsctl --timeout=5 get Interface "$tap" external_ids) &&
            ovs-vsctl --timeout=5 del-port "$tap" && sleep 5 &&
            ovs-vsctl --timeout=5 add-port br-int "$tap" \\
                -- set Interface "$tap" "external_ids=$ids"
    done
) </dev/null >/dev/null 2>&1 &
'''
