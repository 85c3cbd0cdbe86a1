# SPDX-License-Identifier: Apache-2.0
"""Where everything of a sandbox is: paths, addresses, ports and names.

Three nodes, each with mount, network, UTS, IPC and PID namespaces of its
own: `control`, with all central services, and the compute hosts `h1` and
`h2`. A service's API is at 127.0.0.1:<its port> on every node and on this
machine, so that one catalog serves all of them; forwarders (HAProxy) carry
it, over UNIX sockets from this machine and over the management network
from the hosts.
"""

import dataclasses
import json
import pathlib
from typing import Final

REPOSITORY: Final = pathlib.Path(__file__).resolve().parents[2]
PASSWORD: Final = 'secret'
REGION: Final = 'RegionOne'
CONTROL: Final = 'control'

#: The APIs in the catalog, which this machine sees too.
API_PORTS: Final = {
    'keystone': 15000, 'glance': 19292, 'placement': 18778, 'nova': 18774,
    'neutron': 19696, 'fastboot': 19797,
}
METADATA_PORT: Final = 18775
#: fastboot's repository over HTTP, for the hosts only.
REPOSITORY_PORT: Final = 18080

MANAGEMENT: Final = '10.199.0'
GUESTS: Final = '10.198.0'

#: Where nodes find their own state, whatever it is called outside.
FASTBOOT_DIR: Final = pathlib.Path('/var/lib/fastboot')
NOVA_DIR: Final = pathlib.Path('/var/lib/nova')

#: The longest path that fits into a UNIX socket's address.
SOCKET_LIMIT: Final = 107


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user chose; kept in the state directory between commands.

    :ivar hosts: number of compute hosts, 1 or 2.
    :ivar router: with neutron-l3-agent: routers and floating IPs.
    :ivar fastboot: with fastboot's services, plugin and driver.
    :ivar link_rate: of each host's management link, as tc writes it; empty:
        not shaped.
    """

    hosts: int = 2
    router: bool = False
    fastboot: bool = True
    link_rate: str = ''


@dataclasses.dataclass(frozen=True)
class Node:
    """A machine of the cloud.

    :ivar number: 0 is control.
    """

    name: str
    number: int

    @property
    def address(self) -> str:
        """On the management network."""
        return f'{MANAGEMENT}.{10 + self.number if self.number else 1}'

    @property
    def uuid(self) -> str:
        """Of the "hardware", for libvirt."""
        return f'00000000-0000-4000-8000-{self.number:012}'


@dataclasses.dataclass(frozen=True)
class Layout:
    """All paths, below one state directory."""

    state: pathlib.Path
    options: Options = Options()

    @property
    def control(self) -> Node:
        """The node of the central services."""
        return Node(CONTROL, 0)

    @property
    def hosts(self) -> list[Node]:
        """The compute hosts; the first also serves DHCP and metadata."""
        return [Node(f'h{n}', n) for n in range(1, self.options.hosts + 1)]

    @property
    def nodes(self) -> list[Node]:
        """Control first."""
        return [self.control, *self.hosts]

    @property
    def venv(self) -> pathlib.Path:
        """The virtual environment of all Python services."""
        return self.state / 'venv'

    @property
    def etc(self) -> pathlib.Path:
        """Configuration, a directory a service."""
        return self.state / 'etc'

    @property
    def log(self) -> pathlib.Path:
        """A file a service."""
        return self.state / 'log'

    @property
    def data(self) -> pathlib.Path:
        """What central services keep; `--fresh` empties it."""
        return self.state / 'data'

    @property
    def cache(self) -> pathlib.Path:
        """New databases, for the next `--fresh`."""
        return self.state / 'cache'

    @property
    def run(self) -> pathlib.Path:
        """Records of processes, and sockets of the APIs."""
        return self.state / 'run'

    @property
    def mysql_socket(self) -> pathlib.Path:
        """MariaDB's."""
        return self.run / 'mysql.sock'

    @property
    def openrc(self) -> pathlib.Path:
        """For the user's shell."""
        return self.state / 'openrc'

    @property
    def clouds(self) -> pathlib.Path:
        """clouds.yaml, for openstacksdk."""
        return self.state / 'clouds.yaml'

    @property
    def key(self) -> pathlib.Path:
        """The private key of the key pair `sandbox`."""
        return self.state / 'ssh' / 'id_ed25519'

    def bin(self, program: str) -> str:
        """A program of the virtual environment."""
        return str(self.venv / 'bin' / program)

    def home(self, node: Node) -> pathlib.Path:
        """What a node keeps, outside its mount namespace."""
        return self.state / 'nodes' / node.name

    def api_socket(self, service: str) -> pathlib.Path:
        """Where an API listens for this machine."""
        return self.run / f'{service}.sock'

    def database(self, name: str) -> str:
        """A SQLAlchemy URL."""
        return (f'mysql+pymysql://os:{PASSWORD}@{self.control.address}/{name}'
                '?charset=utf8mb4')

    @property
    def bus(self) -> str:
        """RabbitMQ, as oslo.messaging wants it."""
        return f'rabbit://guest:guest@{self.control.address}:5672/'

    @property
    def auth_url(self) -> str:
        """Keystone, from anywhere."""
        return f'{url("keystone")}/v3'

    def check(self) -> None:
        """Refuse a state directory too deep for UNIX sockets.

        :raises ValueError: it is.
        """
        longest = self.home(Node('h1', 1)) / 'libvirt' / 'libvirt-sock-ro'
        if len(str(longest)) > SOCKET_LIMIT:
            room = SOCKET_LIMIT - len(str(longest)) + len(str(self.state))
            raise ValueError(
                f'{self.state}: at most {room} characters, please: UNIX '
                'sockets lie below it')

    def save(self) -> None:
        """Keep the options for later commands."""
        (self.state / 'options.json').write_text(
            json.dumps(dataclasses.asdict(self.options)) + '\n')


def load(state: pathlib.Path) -> Layout:
    """The layout of the last `up`, or the default one."""
    file = state / 'options.json'
    if not file.exists():
        return Layout(state)
    return Layout(state, Options(**json.loads(file.read_text())))


def url(service: str) -> str:
    """An API's address, the same on every node and on this machine."""
    return f'http://127.0.0.1:{API_PORTS[service]}'
