# SPDX-License-Identifier: Apache-2.0
"""The table of services: what runs where, after what, and when it is up."""

import dataclasses
import pathlib
import signal
from collections.abc import Mapping
from typing import Final

from cloud.layout import (
    API_PORTS,
    CONTROL,
    METADATA_PORT,
    Layout,
    Node,
)
from cloud.ready import (
    Check,
    agent_beats,
    answers,
    compute_beats,
    listens,
    listens_at,
    listens_inside,
    lives,
    says,
)
from cloud.rest import Rest

#: Steps between services, see jobs.py.
KEYSTONE_DATABASE: Final = 'keystone database'
IDENTITY: Final = 'identity'

_TERM = signal.SIGTERM


@dataclasses.dataclass(frozen=True)
class Service:
    """A process to run.

    :ivar node: name of the node; empty: this machine.
    :ivar ready: when it counts as started.
    :ivar needs: services and jobs that come before.
    :ivar env: variables besides the common ones.
    :ivar files: its configuration; it is restarted when they change.
    :ivar signum: the signal that ends it.
    :ivar group: its whole process group gets that signal.
    :ivar patience: seconds before SIGKILL.
    :ivar code: it runs fastboot's code, and is restarted when that changes.
    """

    name: str
    node: str
    argv: tuple[str, ...]
    ready: Check
    needs: tuple[str, ...] = ()
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: tuple[pathlib.Path, ...] = ()
    signum: signal.Signals = _TERM
    group: bool = False
    patience: float = 12.0
    code: bool = False


def table(layout: Layout, rest: Rest) -> list[Service]:
    """All services of a layout."""
    services = [_machine_proxy(layout), *_base(layout), *_apis(layout),
                *_central(layout)]
    for node in layout.hosts:
        services += _host(layout, node, rest)
    services += _network_agents(layout, layout.hosts[0], rest)
    if layout.options.fastboot:
        services += _fastboot(layout)
    return services


def environment(layout: Layout) -> dict[str, str]:
    """What every service's environment has."""
    return {
        'PATH': f'{layout.venv}/bin:/usr/sbin:/usr/bin:/sbin:/bin',
        'HOME': '/root', 'LC_ALL': 'C.UTF-8', 'PYTHONUNBUFFERED': '1',
        # nova-manage has another default than the services.
        'OS_NOVA_DISABLE_EVENTLET_PATCHING': '1',
    }


def _machine_proxy(layout: Layout) -> Service:
    config = layout.etc / 'proxy/machine.cfg'
    return Service(
        'proxy', '', ('haproxy', '-db', '-f', str(config)),
        listens_at(API_PORTS['keystone']), files=(config,))


def _base(layout: Layout) -> list[Service]:
    """Database, bus and jobboard."""
    rabbit, redis = layout.data / 'rabbit', layout.data / 'redis'
    redis_socket = layout.run / 'redis.sock'
    address = layout.control.address
    return [
        Service(
            'mariadb', CONTROL,
            ('mariadbd', '--no-defaults', '--user=root',
             f'--datadir={layout.data / "mysql"}',
             f'--bind-address={address}',
             f'--socket={layout.mysql_socket}', '--pid-file=/run/mysql.pid',
             '--max-connections=500', '--skip-log-bin',
             # A killed server loses nothing, a machine that lost its power
             # may lose a second.
             '--innodb-flush-log-at-trx-commit=2',
             '--character-set-server=utf8mb4'),
            listens(layout.mysql_socket), ('mariadb files',), patience=30),
        Service(
            'rabbitmq', CONTROL,
            # Not /usr/sbin's, which would become the user rabbitmq.
            ('/usr/lib/rabbitmq/bin/rabbitmq-server',),
            says('Server startup complete'), ('network',),
            env={
                'HOME': str(rabbit),
                'RABBITMQ_NODENAME': 'rabbit@localhost',
                'RABBITMQ_NODE_IP_ADDRESS': address,
                'RABBITMQ_MNESIA_BASE': str(rabbit / 'mnesia'),
                'RABBITMQ_LOGS': '-',
                'RABBITMQ_CONFIG_FILE':
                    str(layout.etc / 'rabbitmq/rabbitmq.conf'),
                'RABBITMQ_CONF_ENV_FILE': '/nonexistent',
                'RABBITMQ_ENABLED_PLUGINS_FILE': str(rabbit / 'plugins'),
                # Idle schedulers that spin cost the machine a core.
                'RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS':
                    '+sbwt none +sbwtdcpu none +sbwtdio none',
            },
            # A shell that waits for the virtual machine.
            group=True, patience=20),
        Service(
            'redis', CONTROL,
            ('redis-server', '--bind', '127.0.0.1', '--dir', str(redis),
             '--unixsocket', str(redis_socket), '--appendonly', 'yes'),
            listens(redis_socket), ('network',)),
    ]


def _uwsgi(layout: Layout, name: str, module: str, ports: tuple[int, ...],
           threads: int) -> tuple[str, ...]:
    listen = [f'{address}:{port}' for port in ports
              for address in ('127.0.0.1', layout.control.address)]
    sockets = [str(layout.api_socket(name)), *listen]
    return (
        layout.bin('uwsgi'),
        *(word for socket in sockets for word in ('--http-socket', socket)),
        '--chmod-socket=600', '--module', f'{module}:application',
        '--processes', '1', '--threads', str(threads), '--enable-threads',
        '--need-app', '--die-on-term', '--buffer-size', '65535',
        '--http-chunked-input', '--http-auto-chunked', '--http-raw-body',
        '--socket-timeout', '300',
        # glanceclient sends chunks of 1 MiB, which the default limit, with
        # the framing, is just too small for.
        '--chunked-input-limit', '16777216', '--chunked-input-timeout',
        '300', '--add-header', 'Connection: close', '--disable-logging',
        '--procname-prefix', f'{name} ')


def _api(layout: Layout, name: str, module: str, *, port: int, threads: int,
         needs: tuple[str, ...], env: Mapping[str, str],
         files: tuple[pathlib.Path, ...], code: bool = False) -> Service:
    return Service(
        name, CONTROL, _uwsgi(layout, name, module, (port,), threads),
        answers(layout.api_socket(name)), needs, env, files, code=code)


def _apis(layout: Layout) -> list[Service]:
    etc = layout.etc
    # Nova takes its paste file for a configuration file.
    nova = {'OS_NOVA_CONFIG_DIR': str(etc / 'nova'),
            'OS_NOVA_CONFIG_FILES':
                f'{layout.venv}/etc/nova/api-paste.ini;nova.conf'}
    neutron = _api(
        layout, 'neutron', 'neutron.wsgi.api', port=API_PORTS['neutron'],
        threads=4, needs=('neutron database', 'rabbitmq'),
        env={'OS_NEUTRON_CONFIG_DIR': str(etc / 'neutron'),
             'OS_NEUTRON_CONFIG_FILES': 'neutron.conf',
             'TMPDIR': '/run/neutron-api'},
        files=(etc / 'neutron/neutron.conf',))
    return [
        _api(layout, 'keystone', 'keystone.wsgi.api',
             port=API_PORTS['keystone'], threads=4,
             needs=(KEYSTONE_DATABASE,),
             env={'OS_KEYSTONE_CONFIG_DIR': str(etc / 'keystone')},
             files=(etc / 'keystone/keystone.conf',)),
        _api(layout, 'placement', 'placement.wsgi.api',
             port=API_PORTS['placement'], threads=4,
             needs=('placement database', IDENTITY),
             env={'OS_PLACEMENT_CONFIG_DIR': str(etc / 'placement')},
             files=(etc / 'placement/placement.conf',)),
        _api(layout, 'glance', 'glance.wsgi.api', port=API_PORTS['glance'],
             threads=8, needs=('glance database', 'rabbitmq', 'redis'),
             env={'OS_GLANCE_CONFIG_DIR': str(etc / 'glance')},
             files=(etc / 'glance/glance-api.conf',
                    etc / 'glance/glance-image-import.conf'), code=True),
        _api(layout, 'nova', 'nova.wsgi.osapi_compute',
             port=API_PORTS['nova'], threads=6,
             needs=('nova database', 'rabbitmq'), env=nova,
             files=(etc / 'nova/nova.conf',)),
        _api(layout, 'nova-metadata', 'nova.wsgi.metadata',
             port=METADATA_PORT, threads=4,
             needs=('nova database', 'rabbitmq'), env=nova,
             files=(etc / 'nova/nova.conf',)),
        # It believes what an earlier one with the same parent left there.
        dataclasses.replace(neutron, argv=(
            'sh', '-c', 'rm -rf "$TMPDIR"; mkdir "$TMPDIR"; exec "$@"', '-',
            *neutron.argv)),
    ]


def _central(layout: Layout) -> list[Service]:
    nova, neutron = layout.etc / 'nova/nova.conf', \
        layout.etc / 'neutron/neutron.conf'
    # They ask Placement's version when they start.
    needs = ('nova database', 'rabbitmq', 'placement', IDENTITY)
    services = [
        Service('nova-conductor', CONTROL,
                (layout.bin('nova-conductor'), '--config-file', str(nova)),
                says('Starting conductor node'), needs, files=(nova,)),
        Service('nova-scheduler', CONTROL,
                (layout.bin('nova-scheduler'), '--config-file', str(nova)),
                says('Starting scheduler node'), needs, files=(nova,)),
        Service('neutron-rpc', CONTROL,
                (layout.bin('neutron-rpc-server'), '--config-file',
                 str(neutron)),
                says('AMQP RPC server starting|Starting [0-9]* worker|'
                     'Connected to AMQP|RPC worker'),
                ('neutron database', 'rabbitmq'), files=(neutron,)),
    ]
    if layout.options.router:
        # Moves networks away from dead DHCP agents, and answers L3 agents.
        services.append(Service(
            'neutron-periodic', CONTROL,
            (layout.bin('neutron-periodic-workers'), '--config-file',
             str(neutron)), says('Starting [0-9]* worker|worker'),
            ('neutron-rpc',), files=(neutron,)))
    return services


def _host(layout: Layout, node: Node, rest: Rest) -> list[Service]:
    """What every compute host runs."""
    name, home, etc = node.name, layout.home(node), layout.etc
    proxy, compute = etc / f'proxy/{name}.cfg', \
        etc / f'nova/compute-{name}.conf'
    agents = etc / f'neutron/agents-{name}.conf'
    libvirt, ssh = home / 'libvirt-etc', etc / f'ssh/{name}'
    driver = (f'fastboot-agent@{name}',) if layout.options.fastboot else ()
    return [
        Service(f'proxy@{name}', name, ('haproxy', '-db', '-f', str(proxy)),
                listens(layout.run / f'proxy-{name}.stats'), ('network',),
                files=(proxy,)),
        Service(f'virtlogd@{name}', name, ('virtlogd',),
                listens(home / 'libvirt/virtlogd-sock'), ('network',)),
        Service(f'libvirtd@{name}', name, ('libvirtd',),
                listens(home / 'libvirt/libvirt-sock'),
                (f'virtlogd@{name}',),
                files=(libvirt / 'libvirtd.conf', libvirt / 'qemu.conf',
                       libvirt / 'hooks/qemu')),
        Service(f'sshd@{name}', name,
                ('/usr/sbin/sshd', '-D', '-e', '-f', str(ssh)), lives(.3),
                ('network',), files=(ssh,)),
        Service(f'ovsdb@{name}', name,
                ('ovsdb-server', '/run/openvswitch/conf.db',
                 '--remote=punix:/run/openvswitch/db.sock',
                 '--unixctl=/run/openvswitch/ovsdb.ctl', '-vconsole:warn'),
                listens_inside('/run/openvswitch/db.sock'),
                (f'ovs files@{name}',)),
        Service(f'vswitchd@{name}', name,
                ('ovs-vswitchd', 'unix:/run/openvswitch/db.sock',
                 '--unixctl=/run/openvswitch/vswitchd.ctl',
                 '-vconsole:warn'), lives(.3), (f'ovs setup@{name}',)),
        # Its graceful end takes longer than anything, and does nothing.
        Service(f'neutron-ovs@{name}', name,
                (layout.bin('neutron-openvswitch-agent'), '--config-file',
                 str(agents)),
                agent_beats(rest, 'neutron-openvswitch-agent', name),
                (f'bridge@{name}', 'neutron-rpc'), files=(agents,),
                signum=signal.SIGKILL, group=True),
        Service(f'nova-compute@{name}', name,
                (layout.bin('nova-compute'), '--config-file', str(compute)),
                compute_beats(rest, name),
                (f'libvirtd@{name}', f'proxy@{name}', f'bridge@{name}',
                 f'sshd@{name}', 'nova-conductor', 'placement', *driver),
                files=(compute,), patience=20, code=True),
    ]


def _network_agents(layout: Layout, node: Node,
                    rest: Rest) -> list[Service]:
    """DHCP, metadata and routers."""
    agents = layout.etc / f'neutron/agents-{node.name}.conf'
    names = ['dhcp', 'metadata', *(['l3'] if layout.options.router else [])]
    return [
        Service(f'neutron-{name}', node.name,
                (layout.bin(f'neutron-{name}-agent'), '--config-file',
                 str(agents)),
                agent_beats(rest, f'neutron-{name}-agent', node.name),
                (f'bridge@{node.name}', 'neutron-rpc',
                 *(('neutron-periodic',) if name == 'l3' else ())),
                files=(agents,))
        for name in names
    ]


def _fastboot(layout: Layout) -> list[Service]:
    etc = layout.etc / 'fastboot'
    central = etc / 'fastboot.conf'
    services = [
        Service('repository', CONTROL,
                ('nginx', '-e', 'stderr', '-c', str(etc / 'nginx.conf')),
                lives(.3), ('fastboot repository',),
                files=(etc / 'nginx.conf',)),
        Service('fastboot-builder', CONTROL,
                (layout.bin('fastboot-builder'), '--config-file',
                 str(central)), lives(3),
                ('fastboot database', 'rabbitmq', 'redis', IDENTITY,
                 'repository'), files=(central,), patience=30, code=True),
        _api(layout, 'fastboot', 'fastboot_glance.wsgi.api',
             port=API_PORTS['fastboot'], threads=4,
             needs=('fastboot database', 'rabbitmq'),
             env={'OS_FASTBOOT_CONFIG_DIR': str(etc)},
             files=(central, etc / 'policy.yaml'), code=True),
    ]
    for node in layout.hosts:
        agent = etc / f'agent-{node.name}.conf'
        socket = layout.home(node) / 'fastboot/run/agent.sock'
        services.append(Service(
            f'fastboot-agent@{node.name}', node.name,
            (layout.bin('fastboot-agent'), '--config-file', str(agent)),
            answers(socket, '/v1/status'),
            (f'proxy@{node.name}', 'rabbitmq', 'repository'),
            files=(agent,), patience=30, code=True))
    return services
