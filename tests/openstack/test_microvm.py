# SPDX-License-Identifier: Apache-2.0
"""Servers that are resumed instead of booted, in the real cloud.

A real Debian, as identity is what counts. It boots in a minute or two here,
so a server goes through several operations in one test.
"""

import concurrent.futures
import re
import time

import pytest
from parts import settings, small_image
from test_operations import Guest as Server
from test_operations import dead_host, virsh

pytestmark = [pytest.mark.timeout(3600), pytest.mark.slow]

FLAVOR = 'm1.tiny'
#: What a server is, in words of its own.
IDENTITY = """
cat /etc/machine-id /proc/sys/kernel/random/uuid
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo
cat /etc/ssh/ssh_host_ed25519_key.pub
cat /sys/class/net/e*/address
"""
WORDS = ('machine-id', 'random uuid', 'random bytes', 'host key', 'MAC')


class Guest(Server):
    """A server with a shell."""

    def shell(self, words, seconds=300):
        """What a command prints, once the server lets us in."""
        said = []

        def answers():
            said[:] = [self.user.inside(
                'control', 'ssh', '-o', 'ConnectTimeout=10',
                '-o', 'ServerAliveInterval=10',
                f'root@{self.address}', f'{words}\necho so-it-is',
                check=False)]
            return said[0].endswith('so-it-is\n')
        self.user.wait(answers, seconds, f'{self.id} to answer')
        return said[0].removesuffix('so-it-is\n')

    @property
    def address(self):
        return self.server.addresses['private'][0]['addr']

    def goes_on(self, passes=1):
        """It answers, and has the file that it was given."""
        assert self.shell('sha256sum -c /root/proof') == '/root/data: OK\n'

    def give(self):
        """A file, to be found again, and on the disk."""
        self.shell('head -c 3000000 /dev/urandom >/root/data; '
                   'sha256sum /root/data >/root/proof; sync')
        return self

    def machine(self):
        """How the running domain is told to reboot."""
        return re.search('<on_reboot>(.*)</on_reboot>', virsh(
            self.user, self.host, 'dumpxml',
            self.server.instance_name))[1]

    def is_resumed(self):
        return self.machine() == 'destroy'

    def boots_anew(self, ask):
        """`ask` makes it boot; seconds until it answers."""
        before = self.shell('cat /proc/sys/kernel/random/boot_id')
        ask()
        self.user.wait(
            lambda: self.shell('cat /proc/sys/kernel/random/boot_id')
            != before, 400, 'another boot')
        self.wait('ACTIVE')


@pytest.fixture(scope='module')
def image(user, guest):
    """A Debian with a µVM, and lanes of it on both hosts."""
    found = user.upload('microvm', guest, fastboot='microvm')
    try:
        user.wait_built(found, 900)
        user.wait_for_microvm(found)
        yield found
    finally:
        user.cloud.image.delete_image(found, ignore_missing=True)


@pytest.fixture
def start(user, image, clean):
    """Starts a server where lanes are; it must be resumed, unless told
    otherwise; with no word for its log, either is right."""
    def one(host='h1', log='resumed', **more):
        more = {'flavor': FLAVOR, 'prompt': '', **more}
        if log:
            user.wait_for_lanes(image, host)
        found = Guest(user, clean.boot(user.boot('uvm', image, host, **more)),
                      None)
        assert found.boot.log.startswith(log), found.boot.log
        if log:
            assert found.is_resumed() == (log == 'resumed')
        return found
    return one


def test_a_server_of_its_own(user, image, start):
    """Identity, the flavor's size, and what becomes of it at a reboot."""
    flavor = user.cloud.compute.create_flavor(
        name='uvm', ram=1024, vcpus=2, disk=4)
    try:
        guests = [start(flavor='uvm'), start(flavor='uvm', host='h2')]
    finally:
        user.cloud.compute.delete_flavor(flavor)
    told = [one.shell(IDENTITY).splitlines() for one in guests]
    for word, first, second in zip(WORDS, *told, strict=True):
        assert first != second, word
    one = guests[0]
    assert one.shell('hostname') == 'uvm\n'
    assert one.shell('cat /sys/class/dmi/id/product_uuid') == f'{one.id}\n'
    assert one.shell('nproc') == '2\n'
    assert int(one.shell('grep MemTotal /proc/meminfo').split()[1]) > 900_000
    assert int(one.shell('blockdev --getsize64 /dev/vda')) == 4 << 30
    assert int(one.shell('df -B1 --output=size / | tail -1')) > 3 << 30
    assert abs(float(one.shell('date +%s.%N')) - time.time()) < 30
    assert one.id in one.shell('curl -s http://169.254.169.254/openstack/'
                               'latest/meta_data.json')
    one.shell('cloud-init status --wait', 600)
    user.wait(lambda: 'uvm login:' in user.console(one.server), 60,
              'a prompt with its name')
    assert one.shell('cloud-init status').startswith('status: done')
    assert one.shell('cat /var/lib/cloud/data/instance-id') == f'{one.id}\n'
    one.give()
    one.boots_anew(lambda: one.shell('systemctl reboot'))
    assert not one.is_resumed()
    one.goes_on()
    assert one.shell('nproc') == '2\n'
    assert int(one.shell('grep MemTotal /proc/meminfo').split()[1]) > 900_000
    now = one.shell(IDENTITY).splitlines()
    for index in (0, 3, 4):
        assert now[index] == told[0][index], WORDS[index]
    assert one.shell('systemctl is-system-running --wait || true') in (
        'running\n', 'degraded\n')
    assert not one.shell('ls -d /run/fastboot* /etc/*fastboot* '
                         '/var/lib/*fastboot* 2>/dev/null; true')
    # Nova never took it for stopped.
    time.sleep(20)
    assert one.server.status == 'ACTIVE'


def test_as_it_was_resumed(user, start, clean):
    """What can be done with a server before its first reboot."""
    one = start()
    one.give()
    for _ in range(2):
        new = one.other
        one.migrate_live(new)
        one.goes_on()
        assert one.is_resumed()
        # A reboot there has Nova's machine, too.
        assert '<on_reboot>restart<' in virsh(
            user, new, 'dumpxml', '--inactive', one.server.instance_name)
    for ask, undo, status in (('pause', 'unpause', 'PAUSED'),
                              ('suspend', 'resume', 'SUSPENDED')):
        getattr(one.compute, f'{ask}_server')(one.id)
        one.wait(status)
        getattr(one.compute, f'{undo}_server')(one.id)
        one.wait('ACTIVE')
        one.goes_on()
        assert one.is_resumed()
    network = user.cloud.network.find_network('private')
    links = int(one.shell('ls -d /sys/class/net/e* | wc -l'))
    port = one.compute.create_server_interface(one.id, net_id=network.id)
    user.wait(lambda: int(one.shell('ls -d /sys/class/net/e* | wc -l'))
              == links + 1, 60, 'the interface')
    one.compute.delete_server_interface(port.port_id, one.id)
    user.wait(lambda: len(list(one.compute.server_interfaces(one.id))) == 1,
              60, 'the interface to go')
    found = clean.image(one.compute.create_server_image(
        one.id, 'snapshot', metadata={'fastboot': 'off'}).id)
    user.wait(lambda: user.cloud.image.get_image(found).status == 'active',
              300, 'the snapshot')
    one.wait('ACTIVE')
    one.goes_on()
    # And a copy of it boots, with its file.
    copy = Guest(user, clean.boot(user.boot(
        'copy', found, one.other, flavor=FLAVOR, prompt='')), None)
    copy.goes_on()


def test_a_reboot_while_it_migrates(user, start):
    """Its machine ends then, and it has not moved."""
    one = start().give()
    old, rate = one.host, user.layout.options.link_rate or 'off'
    user.sandbox('link-rate', '20mbit')
    try:
        # libvirt takes no more orders for it then, as to press keys.
        one.shell('(sleep 40; echo b >/proc/sysrq-trigger) '
                  '</dev/null >/dev/null 2>&1 &')
        one.compute.live_migrate_server(one.id, host=one.other,
                                        block_migration='auto')
        name = one.server.instance_name
        user.wait(lambda: 'Unbounded' in virsh(user, old, 'domjobinfo', name),
                  30, 'the migration to begin')
        one.wait('ACTIVE', 300)
    finally:
        user.sandbox('link-rate', rate)
    assert one.host == old
    user.wait(lambda: not one.is_resumed(), 60, 'its own machine')
    one.goes_on()
    # And nothing of it is at the other host.
    assert name not in virsh(user, one.other, 'list', '--all', '--name')


def test_soft_reboot_stop_and_start(user, start):
    one = start().give()
    one.boots_anew(lambda: one.compute.reboot_server(one.id, 'SOFT'))
    assert not one.is_resumed()
    one.goes_on()
    one.stop()
    one.compute.start_server(one.id)
    one.wait('ACTIVE')
    one.goes_on()


def test_hard_reboot(user, start):
    one = start().give()
    one.boots_anew(lambda: one.compute.reboot_server(one.id, 'HARD'))
    assert not one.is_resumed()
    one.goes_on()
    one.migrate_live(one.other)
    # Neutron 29.0's agent hears nothing of the old binding's end, takes the
    # port for one that goes on migrating, and gives its next tap no VLAN (a
    # stock server's, too). News of the port cure it.
    network = user.cloud.network
    for port in network.ports(device_id=one.id):
        network.update_port(port, description='it is here')
    time.sleep(5)
    # Nova's own machine without KVM spins in the kernel where it arrives
    # (QEMU 7.2, i440fx, qemu64; a server on a stock disk, too).
    one.compute.reboot_server(one.id, 'HARD')
    time.sleep(1)
    one.wait('ACTIVE')
    one.goes_on()


def test_restarts_around_it(user, start):
    """It is what runs; nobody takes it for what is defined."""
    one = start().give()
    for service in 'libvirtd', 'nova-compute', 'fastboot-agent':
        user.sandbox('restart', f'{service}@{one.host}')
        one.goes_on()
        assert one.is_resumed()
    one.boots_anew(lambda: one.shell('systemctl reboot'))
    assert not one.is_resumed()
    one.goes_on()


def test_resize_and_migrate(user, start):
    one = start().give()
    flavor = user.cloud.compute.create_flavor(
        name='uvm-large', ram=1024, vcpus=2, disk=5)
    try:
        one.compute.resize_server(one.id, flavor)
        one.wait('VERIFY_RESIZE', 300)
    finally:
        user.cloud.compute.delete_flavor(flavor)
    one.compute.confirm_server_resize(one.id)
    one.wait('ACTIVE')
    one.goes_on()
    assert one.shell('nproc') == '2\n'
    old = one.host
    one.compute.migrate_server(one.id, host=one.other)
    one.wait('VERIFY_RESIZE', 300)
    one.compute.revert_server_resize(one.id)
    one.wait('ACTIVE')
    assert one.host == old
    one.goes_on()


def test_rescue_rebuild_and_shelve(user, image, start):
    one = start().give()
    one.compute.rescue_server(one.id)
    one.wait('RESCUE')
    one.compute.unrescue_server(one.id)
    one.wait('ACTIVE')
    one.goes_on()
    one.compute.shelve_server(one.id)
    user.wait(lambda: one.server.status == 'SHELVED_OFFLOADED', 300,
              'the shelf')
    one.compute.unshelve_server(one.id)
    one.wait('ACTIVE', 300)
    one.goes_on()
    key = one.shell('cat /etc/ssh/ssh_host_ed25519_key.pub')
    one.compute.rebuild_server(one.id, image=image)
    time.sleep(1)
    one.wait('ACTIVE', 300)
    # As new: resumed again, and nothing of before.
    assert one.is_resumed()
    assert one.shell('cat /root/proof 2>/dev/null; true') == ''
    assert one.shell('cat /etc/ssh/ssh_host_ed25519_key.pub') != key


def test_evacuate(user, start):
    # Not from h1, whose switch goes on when the host is said to be dead: the
    # DHCP server is behind it, and would go on to the old port.
    one = start(host='h2')
    old, new = one.host, one.other
    with dead_host(user, old):
        one.compute.evacuate_server(one.id, host=new)
        user.wait(lambda: one.host == new and one.server.task_state is None,
                  180, 'the evacuation')
        if one.server.status == 'SHUTOFF':
            one.compute.start_server(one.id)
        one.wait('ACTIVE')
        assert one.shell('hostname') == 'uvm\n'


def test_eight_at_once(user, image, start):
    """Each is its own, and none is in ERROR."""
    def begin(number):
        return start(host=('h1', 'h2')[number % 2], log='')
    for host in 'h1', 'h2':
        user.wait_for_lanes(image, host, 2)
    # Without KVM they share two processors.
    with (settings(user, 'h1', 'fastboot', resume_deadline=300),
          settings(user, 'h2', 'fastboot', resume_deadline=300),
          concurrent.futures.ThreadPoolExecutor(8) as pool):
        guests = list(pool.map(begin, range(8)))
    # Those for whom there was a lane; more are made as fast as it goes.
    assert sum(one.is_resumed() for one in guests) >= 4
    told = [one.shell(IDENTITY, 600).splitlines() for one in guests]
    for index, word in enumerate(WORDS):
        assert len({words[index] for words in told}) == 8, word


def test_without_a_config_drive(user, image, clean):
    """The metadata service is enough."""
    compute = user.cloud.compute
    network = user.cloud.network.find_network('private')
    user.wait_for_lanes(image, 'h1')
    server = compute.create_server(
        name='uvm', image_id=image, host='h1', key_name='sandbox',
        flavor_id=compute.find_flavor(FLAVOR).id,
        networks=[{'uuid': network.id}])
    server = user.wait_active(server.id)
    assert user.driver_log('h1', server.id).startswith('resumed')
    one = Guest(user, type('Boot', (), {'server': server}), None)
    assert one.shell('hostname', 400) == 'uvm\n'


def test_the_first_reboot_may_be_the_guests_own(user, start):
    """Also one that comes while cloud-init is at work."""
    one = start()
    one.give()
    one.boots_anew(lambda: one.shell('systemctl reboot --force'))
    assert not one.is_resumed()
    one.goes_on()


# Servers that are not resumed

def test_wishes(user, image, start):
    """A flavor that does not want it, and one that is too small."""
    with user.booting_flavor('boots') as flavor:
        start(flavor=flavor, log='hit')
    start(flavor='m1.nano', log='booted')
    with settings(user, 'h1', 'fastboot', resume='false'):
        start(log='hit')


def test_a_guest_that_stays_silent(user, image, start):
    """Its server boots, from a disk that no other had."""
    user.wait_for_lanes(image, 'h1')
    used = user.home('h1') / 'nova/instances/used'
    try:
        # A name more, so that no other disk gets its inode.
        with (settings(user, 'h1', 'fastboot', resume_deadline=20),
              user.suspending('h1', 'cd /var/lib/nova/instances && '
                                    'ln "$uuid/disk" used')):
            one = start(log='resume failed (wait)')
        assert used.stat().st_nlink == 1, 'it is nobody\'s disk any more'
        assert not used.samefile(user.instance_path(one.server) / 'disk')
    finally:
        used.unlink(missing_ok=True)
    assert one.shell('hostname', 400) == 'uvm\n'
    assert one.shell('cat /var/lib/cloud/data/instance-id') == f'{one.id}\n'


def test_a_damaged_lane(user, image, start):
    """libvirt or QEMU refuses it; the next server has another."""
    user.wait_for_lanes(image, 'h1', 2)
    places = list((user.home('h1') / 'fastboot/host/microvms').glob(
        'lanes/*'))
    assert places
    for place in places:
        with place.open('r+b') as file:
            file.seek(place.stat().st_size // 4 & ~0xfff)
            file.write(b'\xff' * (1 << 20))
    one = start(log='resume failed')
    assert one.shell('cat /var/lib/cloud/data/instance-id',
                     400) == f'{one.id}\n'
    user.wait_for_lanes(image, 'h1')
    # The other one may have been damaged, too.
    for _ in range(len(places)):
        one = start(log='')
        if one.is_resumed():
            return
        user.wait_for_lanes(image, 'h1')
    raise AssertionError('none was resumed any more')


def test_the_agent_dies_on_the_way(user, image, start):
    """Between anything: the server becomes ACTIVE."""
    for seconds in (0.5, 1.5, 3.0):
        user.wait_for_lanes(image, 'h1')
        with concurrent.futures.ThreadPoolExecutor() as pool:
            begun = pool.submit(start, log='')
            time.sleep(seconds)
            user.sandbox('restart', 'fastboot-agent@h1')
            assert begun.result().server.status == 'ACTIVE'


def test_the_image_goes(user, guest, clean):
    """Its µVMs go with it, and its servers stay."""
    image = small_image(user, 'goes', guest, fastboot='microvm')
    clean.image(image)
    user.wait_for_microvm(image)
    one = Guest(user, clean.boot(user.boot('uvm', image, 'h1', prompt='')),
                None)
    assert one.boot.log.startswith('resumed'), one.boot.log
    one.give()
    user.cloud.image.delete_image(image)
    user.wait(lambda: not user.microvm(image, 'h1'), 300, 'the µVM to go')
    one.goes_on()
    one.boots_anew(lambda: one.compute.reboot_server(one.id, 'HARD'))
    one.goes_on()
