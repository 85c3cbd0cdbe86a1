# SPDX-License-Identifier: Apache-2.0
"""What a user of the sandbox does, and a spectator sees.

For the demo, benchmarks and tests, which have openstacksdk; the sandbox
itself does not import this.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import libvirt
import libvirt_qemu
import openstack
import pymysql
from openstack import config

from cloud import node, proxy_counters
from cloud.layout import Layout
from cloud.process import Records, members, namespace

PROMPT: Final = 'login:'
NETWORK: Final = 'private'
_POLL_SECONDS: Final = 0.1
_CLI_SECONDS: Final = 900
#: Between two looks of what is timed (seconds). They cost next to nothing:
#: two processors do all that is looked at. A question to Nova's API takes
#: 0.1 s of one, and each start of virsh 0.04.
_GLANCE_SECONDS: Final = 0.02
_STATE: Final = (
    'select vm_state from nova.instances where uuid = %(uuid)s union '
    'select vm_state from nova_cell0.instances where uuid = %(uuid)s')
_PING: Final = '{"execute": "guest-ping"}'
#: Suspends the next guest that comes to life on a host, then runs what it is
#: given. It takes no processor before there is one.
_SUSPEND: Final = '''
old=$(virsh list --name)
virsh event --event lifecycle --timeout 300 >/dev/null
for n in $(seq 300); do
    for guest in $(virsh list --name --state-running); do
        case "$old" in *"$guest"*) continue ;; esac
        virsh suspend "$guest"
        uuid=$(virsh domuuid "$guest")
        eval "$1"
        exit
    done
    sleep .1
done
exit 1
'''


class CloudError(Exception):
    """The cloud did something else; the words say what."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a host has read so far (bytes).

    :ivar disk: written below its directory, as the kernel counts blocks.
    """

    glance: int
    repository: int
    disk: int

    def __sub__(self, earlier: 'Traffic') -> 'Traffic':
        return Traffic(self.glance - earlier.glance,
                       self.repository - earlier.repository,
                       self.disk - earlier.disk)


@dataclasses.dataclass(frozen=True)
class Boot:
    """A server that was started.

    :ivar active: seconds from the request to ACTIVE.
    :ivar prompt: seconds from the request to the login prompt; None: it was
        not waited for.
    :ivar answer: the same, to the first answer of its guest agent.
    :ivar log: what fastboot's driver said of it in nova-compute's log.
    """

    server: Any
    active: float
    prompt: float | None
    traffic: Traffic
    log: str
    answer: float | None = None


class User:
    """The administrator, at this machine."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        region = config.OpenStackConfig(
            config_files=[str(layout.clouds)]).get_one(cloud='sandbox')
        self.cloud = openstack.connection.Connection(config=region)

    # The command line

    def openstack(self, *words: object, check: bool = True) -> str:
        """Run the `openstack` command.

        :returns: what it printed.
        :raises CloudError: it failed, and `check` is true.
        """
        environment = {
            **os.environ, 'OS_CLIENT_CONFIG_FILE': str(self.layout.clouds),
            'OS_CLOUD': 'sandbox',
            'PATH': f'{self.layout.venv}/bin:{os.environ["PATH"]}'}
        done = subprocess.run(
            [self.layout.bin('openstack'), *map(str, words)],
            env=environment, capture_output=True, text=True,
            timeout=_CLI_SECONDS)
        if check and done.returncode:
            raise CloudError(f'openstack {" ".join(map(str, words))}: '
                             f'{done.stderr.strip()[-2000:]}')
        return done.stdout if check else done.stdout + done.stderr

    def ask(self, *words: object) -> Any:
        """The same, read as JSON."""
        return json.loads(self.openstack(*words, '-f', 'json'))

    # Images

    def upload(self, name: str, file: pathlib.Path, *, how: str = 'upload',
               disk_format: str = 'qcow2', **properties: str) -> str:
        """Make an image with `openstack image create`.

        :param how: ``upload`` or ``import``.
        :returns: its id, once it is active.
        """
        words = ['--import'] if how == 'import' else []
        for key, value in properties.items():
            words += ['--property', f'{key}={value}']
        image = self.ask(
            'image', 'create', '--disk-format', disk_format,
            '--container-format', 'bare', '--file', file, '--public',
            *words, name)
        self.wait(lambda: self.cloud.image.get_image(
            image['id']).status == 'active', 120, f'{name} to be active')
        return str(image['id'])

    def fastboot_image(self, image: str) -> dict[str, Any]:
        """What `openstack fastboot image show` says."""
        found: dict[str, Any] = self.ask('fastboot', 'image', 'show', image)
        return found

    def wait_built(self, image: str, seconds: float = 600,
                   tell: Callable[[str], None] = lambda _: None,
                   state: str = 'ready') -> None:
        """Wait until the property `fastboot_state` of an image says so.

        :param tell: told every new state.
        :raises CloudError: it ends otherwise.
        """
        said = ''
        for _ in self._until(seconds, f'{image} to be {state}'):
            found = self.cloud.image.get_image(image)
            now = str(found.properties.get('fastboot_state', 'waiting'))
            if now != said:
                tell(now)
                said = now
            if now == state:
                return
            if now in ('error', 'skipped', 'ready'):
                raise CloudError(
                    f'{image} is {now}: '
                    f'{found.properties.get("fastboot_error", "")}')

    def wait_on_hosts(self, image: str, seconds: float = 300) -> None:
        """Wait until the boot set of an image is on every host."""
        for host in self.layout.hosts:
            self.wait(lambda name=host.name: self.agent_state(  # type: ignore
                name, image) in ('ready', 'thawed', 'complete'),
                seconds, f'{image} on {host.name}')

    def agent_state(self, host: str, image: str) -> str:
        """What the agent of a host says of an image."""
        answer = self.ask_agent(host, 'GET', f'/v1/images/{image}')
        return str(answer.get('state', 'absent'))

    def ask_agent(self, host: str, method: str, path: str,
                  body: Any = None) -> dict[str, Any]:
        """Call the local API of an agent."""
        home = self.home(host)
        words = ['curl', '-s', '--max-time', '20', '-X', method,
                 '--unix-socket', str(home / 'fastboot/run/agent.sock'),
                 f'http://agent{path}']
        if body is not None:
            words += ['-H', 'Content-Type: application/json',
                      '-d', json.dumps(body)]
        said = subprocess.run(words, capture_output=True, text=True,
                              timeout=30).stdout
        answer: dict[str, Any] = json.loads(said or '{}')
        return answer

    # Servers

    def boot(self, name: str, image: str, host: str = '', *,
             flavor: str = 'm1.tiny', prompt: str = PROMPT,
             answer: bool = False, seconds: float = 300,
             **more: Any) -> Boot:
        """Start a server and wait for it.

        :param host: where; empty: Nova decides.
        :param prompt: what its console says at last; empty: wait for ACTIVE.
        :param answer: wait for its guest agent, too, which may answer
            before Nova says ACTIVE; `host` is given then, and its image
            has the property ``hw_qemu_guest_agent``.
        :raises CloudError: it ends in ERROR, or takes too long.
        """
        compute = self.cloud.compute
        before = {node.name: self.traffic(node.name)
                  for node in self.layout.hosts}
        if host:
            more['host'] = host
        network = self.cloud.network.find_network(NETWORK)
        flavor_id = compute.find_flavor(flavor).id
        began = time.monotonic()
        server = compute.create_server(
            name=name, image_id=image, flavor_id=flavor_id,
            networks=[{'uuid': network.id}], config_drive=True,
            key_name='sandbox', **more)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answered = pool.submit(self._answered, server.id, host, seconds
                                   ) if answer else None
            active = self._built(server.id, seconds) - began
            server = self.wait_active(server.id, seconds)
            came = self._printed(server, prompt, seconds) if prompt else None
            heard = answered.result() if answered else None
        place = str(server.hypervisor_hostname)
        return Boot(server, active, came and came - began,
                    self.traffic(place) - before[place],
                    self.driver_log(place, server.id),
                    heard and heard - began)

    def _printed(self, server: Any, prompt: str, seconds: float) -> float:
        """When its console has said something (monotonic seconds)."""
        self.wait(lambda: prompt in self.console(server), seconds,
                  f'{prompt!r} of {server.name}')
        return time.monotonic()

    def _built(self, server_id: str, seconds: float) -> float:
        """When Nova has written that it runs, or cannot (monotonic seconds).

        Where its API reads it.
        """
        with contextlib.closing(pymysql.connect(
                unix_socket=str(self.layout.mysql_socket), user='root',
                autocommit=True)) as found, found.cursor() as cursor:
            for _ in self._until(seconds, f'server {server_id} to be built',
                                 _GLANCE_SECONDS):
                cursor.execute(_STATE, {'uuid': server_id})
                if any(row != ('building',) for row in cursor):
                    return time.monotonic()
        raise AssertionError

    def _answered(self, server_id: str, host: str, seconds: float) -> float:
        """When its guest agent has answered (monotonic seconds)."""
        with self.hypervisor(host) as found:
            for _ in self._until(seconds, f'{server_id} to answer',
                                 _GLANCE_SECONDS):
                with contextlib.suppress(libvirt.libvirtError):
                    libvirt_qemu.qemuAgentCommand(
                        found.lookupByUUIDString(server_id), _PING, 1, 0)
                    return time.monotonic()
        raise AssertionError

    def wait_for_microvm(self, image: str, seconds: float = 900) -> None:
        """Wait until an image has a µVM, and every host a lane of it.

        :raises CloudError: it has none, or takes too long.
        """
        for _ in self._until(seconds, f'the µVM of {image}'):
            found = self.cloud.image.get_image(image).properties
            state = found.get('fastboot_microvm')
            if reason := found.get('fastboot_microvm_error'):
                raise CloudError(f'{image} has no µVM: {reason}')
            if state == 'ready' and all(
                    self.microvm(image, host.name).get('lanes', 0)
                    for host in self.layout.hosts):
                return

    def wait_for_lanes(self, image: str, host: str, count: int = 1,
                       seconds: float = 300) -> None:
        """Wait until so many lanes of an image's µVM wait on a host.

        :raises CloudError: it takes longer.
        """
        self.wait(
            lambda: self.microvm(image, host).get('lanes', 0) >= count,
            seconds, f'lanes on {host}')

    def microvm(self, image: str, host: str) -> dict[str, Any]:
        """What the agent of a host says of an image's µVM."""
        return next((row for row in self.microvms(host)
                     if row['image'] == image), {})

    def microvms(self, host: str) -> list[dict[str, Any]]:
        """What the agent of a host says of all µVMs."""
        return self.ask_agent(host, 'GET', '/v1/microvms').get(
            'microvms') or []

    @contextlib.contextmanager
    def booting_flavor(self, name: str) -> Iterator[str]:
        """A flavor like m1.tiny whose servers are not resumed."""
        compute = self.cloud.compute
        made = compute.create_flavor(name=name, ram=512, vcpus=1, disk=2)
        try:
            compute.create_flavor_extra_specs(
                made, {'fastboot:microvm': 'no'})
            yield name
        finally:
            compute.delete_flavor(made)

    def wait_active(self, server: str, seconds: float = 300) -> Any:
        """Wait until a server is ACTIVE.

        :raises CloudError: it ends in ERROR.
        """
        for _ in self._until(seconds, f'server {server} to be ACTIVE'):
            found = self.cloud.compute.get_server(server)
            if found.status == 'ACTIVE':
                return found
            if found.status == 'ERROR':
                raise CloudError(f'server {server}: '
                                 f'{(found.fault or {}).get("message")}')
        raise AssertionError

    def console(self, server: Any) -> str:
        """What a server printed, read from its host's file."""
        path = self.instance_path(server) / 'console.log'
        return path.read_text(errors='replace') if path.exists() else ''

    def instance_path(self, server: Any) -> pathlib.Path:
        """The directory of a server's disks, as this machine sees it."""
        return (self.home(server.hypervisor_hostname) / 'nova/instances'
                / str(server.id))

    def driver_log(self, host: str, server: str) -> str:
        """fastboot's line about a server in nova-compute's log."""
        file = self.layout.log / f'nova-compute@{host}.log'
        lines = [line for line in
                 file.read_text(errors='replace').splitlines()
                 if server in line and 'fastboot: ' in line]
        return lines[-1].partition('fastboot: ')[2] if lines else ''

    def delete(self, *servers: Any) -> None:
        """Delete servers and wait until they are gone."""
        for server in servers:
            self.cloud.compute.delete_server(server.id, ignore_missing=True)
        for server in servers:
            self.wait(lambda one=server:  # type: ignore
                      self.cloud.compute.find_server(one.id) is None,
                      120, f'server {server.id} to be gone')

    # Operators

    def sandbox(self, *words: object, check: bool = True) -> str:
        """Run `tools/sandbox`, to stop, start or restart services.

        :returns: what it printed.
        :raises CloudError: it failed, and `check` is true.
        """
        tool = pathlib.Path(__file__).resolve().parents[1] / 'sandbox'
        done = subprocess.run(
            [tool, '--state-dir', self.layout.state, *map(str, words)],
            capture_output=True, text=True, timeout=300)
        if check and done.returncode:
            raise CloudError(f'sandbox {words}: {done.stdout}{done.stderr}')
        return done.stdout

    def inside(self, host: str, *words: object, check: bool = True) -> str:
        """What a command prints that runs on a host; see :meth:`sandbox`."""
        return self.sandbox('exec', host, *words, check=check)

    @contextlib.contextmanager
    def suspending(self, host: str, then: str = '') -> Iterator[None]:
        """Have the next guest stand still that comes to life on a host.

        :param then: what the host's shell does next; it knows ``$uuid``.
        :raises CloudError: none came.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.inside, host, 'sh', '-c', _SUSPEND, 'sh',
                               then)
            yield
            done.result()

    def forget_base(self, host: str, image: str) -> None:
        """Remove the bases of an image on a host, as Nova's cache manager
        does when no server there uses it."""
        name = hashlib.sha1(image.encode()).hexdigest()
        for file in (self.home(host) / 'nova/instances/_base').glob(
                f'{name}*'):
            file.unlink()

    def pids(self, service: str) -> list[int]:
        """The processes of a service, as this machine counts them.

        :raises CloudError: it does not run.
        """
        record = Records(self.layout.run).get(service)
        if record is None or not record.alive:
            raise CloudError(f'{service} does not run')
        return [record.pid]

    def home(self, host: str) -> pathlib.Path:
        """The directory of a host."""
        return next(self.layout.home(one) for one in self.layout.hosts
                    if one.name == host)

    def hypervisor(self, host: str) -> Any:
        """A connection to libvirt on a host, which it ends with the body.

        :raises CloudError: the host is not up.
        """
        libvirt.registerErrorHandler(lambda context, error: None, None)
        # Not by the path here: sockets have paths of 108 bytes at most.
        return contextlib.closing(libvirt.open(
            f'qemu:///system?socket=/proc/{self._first_process(host)}/root'
            f'/run/libvirt/libvirt-sock'))

    def processes(self, host: str, program: str) -> list[int]:
        """Processes on a host whose program's name begins so.

        :raises CloudError: the host is not up.
        """
        return members(namespace(self._first_process(host)), program)

    def _first_process(self, host: str) -> int:
        record = Records(self.layout.run).get(f'node@{host}')
        if record is None:
            raise CloudError(f'{host} is not up')
        return node.first_process(record)

    # Spectators

    def traffic(self, host: str) -> Traffic:
        """What a host has read and written since its forwarder started."""
        counted = proxy_counters.read(
            self.layout.run / f'proxy-{host}.stats')
        home = self.home(host)
        return Traffic(counted.get('glance', 0),
                       counted.get('repository', 0),
                       _blocks(home / 'nova', home / 'fastboot'))

    def wait(self, condition: Callable[[], bool], seconds: float,
             what: str) -> None:
        """Wait until a condition holds.

        :raises CloudError: it takes longer.
        """
        for _ in self._until(seconds, what):
            if condition():
                return

    @staticmethod
    def _until(seconds: float, what: str, pause: float = _POLL_SECONDS
               ) -> Iterator[None]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            yield
            time.sleep(pause)
        raise CloudError(f'waited {seconds:.0f} s for {what}')


def _blocks(*directories: pathlib.Path) -> int:
    """Bytes that files occupy, each file once."""
    found: dict[tuple[int, int], int] = {}
    for directory in directories:
        for root, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError):
                    status = os.lstat(os.path.join(root, name))
                    found[status.st_dev, status.st_ino] = \
                        status.st_blocks * 512
    return sum(found.values())
