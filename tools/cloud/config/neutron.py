# SPDX-License-Identifier: Apache-2.0
"""Neutron's files: the central server's, and one of all agents of a host.

ML2 with the Open vSwitch agent on the userspace datapath, which needs no
kernel module. Nodes have a /run of their own; what is in it ends with them.
"""

from cloud.config.ini import Sections, authtoken, client, merged, render
from cloud.layout import METADATA_PORT, PASSWORD, Layout, Node

#: The physical network that the guests' links are.
PHYSICAL_NETWORK = 'physnet1'
_BRIDGE = 'br-ph'


def _common(layout: Layout, node: Node) -> Sections:
    return {
        'DEFAULT': {
            'host': node.name,
            'state_path': '/run/neutron',
            'transport_url': layout.bus,
            'periodic_fuzzy_delay': 0,
            'rpc_response_max_timeout': 60,
            'graceful_shutdown_timeout': 3,
        },
        # Everything is root here, so that no sudo is needed: "env COMMAND".
        'agent': {'root_helper': 'env', 'report_interval': 3},
        'oslo_concurrency': {'lock_path': '/run/neutron/lock'},
        'securitygroup': {'enable_security_group': True,
                          'firewall_driver': 'openvswitch'},
    }


def server(layout: Layout) -> str:
    """neutron.conf."""
    return render(merged(_common(layout, layout.control), {
        'DEFAULT': {
            'core_plugin': 'ml2',
            'service_plugins': 'router',
            'auth_strategy': 'keystone',
            'api_paste_config': layout.venv / 'etc/neutron/api-paste.ini',
            'rpc_workers': 1,
            'rpc_state_report_workers': 1,
            'agent_down_time': 15,
            'dhcp_agents_per_network': 1,
            'notify_nova_on_port_status_changes': True,
            'notify_nova_on_port_data_changes': True,
            'global_physnet_mtu': 1500,
        },
        'database': {'connection': layout.database('neutron')},
        **authtoken(layout, 'neutron'),
        'nova': client(layout, 'nova'),
        'placement': client(layout, 'placement'),
        'ml2': {
            'type_drivers': 'flat,vlan,local',
            'tenant_network_types': 'vlan',
            'mechanism_drivers': 'openvswitch',
            'extension_drivers': 'port_security',
        },
        'ml2_type_flat': {'flat_networks': PHYSICAL_NETWORK},
        'ml2_type_vlan': {
            'network_vlan_ranges': f'{PHYSICAL_NETWORK}:100:199'},
    }))


def agents(layout: Layout, node: Node) -> str:
    """neutron-agents.conf of a host; without the database."""
    return render(merged(_common(layout, node), {
        'DEFAULT': {
            'interface_driver': 'openvswitch',
            # Metadata for networks without a router, too.
            'enable_isolated_metadata': True,
            'force_metadata': True,
            'dhcp_domain': 'sandbox.',
            'resync_interval': 5,
            'nova_metadata_host': layout.control.address,
            'nova_metadata_port': METADATA_PORT,
            'metadata_proxy_shared_secret': PASSWORD,
            'metadata_workers': 0,
        },
        'ovs': {
            'ovsdb_connection': 'unix:/run/openvswitch/db.sock',
            'datapath_type': 'netdev',
            'integration_bridge': 'br-int',
            'bridge_mappings': f'{PHYSICAL_NETWORK}:{_BRIDGE}',
        },
        'agent': {'tunnel_types': ''},
    }))


def bridge() -> list[str]:
    """The ovs-vsctl words that make the bridge of the guests' link."""
    return ['--may-exist', 'add-br', _BRIDGE, '--', 'set', 'bridge', _BRIDGE,
            'datapath_type=netdev', '--', '--may-exist', 'add-port', _BRIDGE,
            'data']
