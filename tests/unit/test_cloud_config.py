# SPDX-License-Identifier: Apache-2.0
"""tools/cloud: configuration files, the table of services, the layout."""

import configparser
import pathlib
import sys

import pytest

from fastboot_glance import registry

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

from cloud import config, node, proxy_counters  # noqa: E402
from cloud.config import ini  # noqa: E402
from cloud.layout import Layout, Node, Options, load  # noqa: E402
from cloud.rest import Rest, moment  # noqa: E402
from cloud.sandbox import Sandbox, closure  # noqa: E402
from cloud.services import table  # noqa: E402
from cloud.steps import Clock  # noqa: E402

STATE = pathlib.Path('/srv/sandbox')
VARIANTS = [Options(hosts, router, fastboot)
            for hosts in (1, 2) for router in (False, True)
            for fastboot in (False, True)]


def parsed(layout, name):
    parser = configparser.RawConfigParser(strict=True)
    parser.read_string(config.files(layout)[layout.etc / name])
    return parser


class TestIni:
    def test_render(self):
        assert ini.render({'DEFAULT': {'debug': True, 'a': ['b', 'c']},
                           'x': {'y': 1}}) == (
            '[DEFAULT]\ndebug = true\na = b,c\n[x]\ny = 1\n')

    def test_later_parts_win_option_by_option(self):
        parts = {'a': {'x': 1, 'y': 2}}, {'a': {'y': 3}, 'b': {'z': 4}}
        assert ini.merged(*parts) == {'a': {'x': 1, 'y': 3}, 'b': {'z': 4}}
        assert parts[0] == {'a': {'x': 1, 'y': 2}}


class TestFiles:
    @pytest.mark.parametrize('options', VARIANTS)
    def test_each_conf_parses(self, options):
        layout = Layout(STATE, options)
        names = [path.relative_to(layout.etc)
                 for path, text in config.files(layout).items()
                 if path.suffix == '.conf' and text
                 and path.is_relative_to(layout.etc)
                 and path.name not in ('nginx.conf', 'rabbitmq.conf')]
        assert len(names) >= 6
        for name in names:
            assert parsed(layout, name).sections() or \
                parsed(layout, name).defaults()

    def test_hosts_have_no_database(self):
        """Nova and Neutron refuse, or loosen, what has one."""
        layout = Layout(STATE)
        for path, text in config.files(layout).items():
            if path.name.rpartition('-')[2] in ('h1.conf', 'h2.conf'):
                assert 'mysql' not in text, path

    def test_fastboot_is_a_matter_of_configuration(self):
        on, off = Layout(STATE), Layout(STATE, Options(fastboot=False))
        name = 'nova/compute-h2.conf'
        assert parsed(on, name)['DEFAULT']['compute_driver'] == \
            'fastboot.FastbootLibvirtDriver'
        assert parsed(on, name)['libvirt']['disk_cachemodes'] == \
            'file=writeback'
        assert parsed(off, name)['DEFAULT']['compute_driver'] == \
            'libvirt.LibvirtDriver'
        option = 'non_inheritable_image_properties'
        assert parsed(on, 'nova/nova.conf')['DEFAULT'][option].split(
            ',')[2:] == [*registry.PROPERTIES]
        assert option not in parsed(off, 'nova/nova.conf')['DEFAULT']
        plugin = 'glance/glance-image-import.conf'
        assert '[fastboot]' in config.files(on)[on.etc / plugin]
        assert config.files(off)[off.etc / plugin] == ''

    def test_write_removes_what_must_not_be(self, tmp_path):
        on = Layout(tmp_path)
        config.write(on)
        plugin = on.etc / 'glance/glance-image-import.conf'
        assert plugin.stat().st_mode & 0o777 == 0o640
        config.write(Layout(tmp_path, Options(fastboot=False)))
        assert not plugin.exists()

    def test_repository_is_for_hosts_only(self):
        files = config.files(Layout(STATE))
        assert '18080' not in files[STATE / 'etc/proxy/machine.cfg']
        assert '18080' in files[STATE / 'etc/proxy/h1.cfg']

    def test_catalog_is_the_same_everywhere(self):
        files = config.files(Layout(STATE))
        for port in (15000, 19292, 18778, 18774, 19696, 19797):
            for name in ('machine', 'h1', 'h2'):
                assert f'bind 127.0.0.1:{port}\n' in \
                    files[STATE / f'etc/proxy/{name}.cfg']


class TestTable:
    @pytest.mark.parametrize('options', VARIANTS)
    def test_every_need_exists_and_none_is_circular(self, options):
        sandbox = Sandbox(Layout(STATE, options), Clock())
        graph = {step.name: step.needs for step in sandbox.steps()}
        assert len(graph) == len(sandbox.steps())
        for name in graph:
            needs = closure(graph, name)
            assert needs <= set(graph)
            assert name not in needs

    def test_all_that_asks_the_bus_ends_before_it(self):
        sandbox = Sandbox(Layout(STATE), Clock())
        graph = {step.name: step.needs for step in sandbox.steps()}
        for name in ('nova-compute@h2', 'nova', 'neutron-dhcp', 'glance',
                     'fastboot-agent@h1', 'fastboot-builder'):
            assert {'rabbitmq', 'network'} <= closure(graph, name)
        assert 'mariadb' in closure(graph, 'nova-conductor')

    def test_parts_can_be_left_out(self):
        def names(options):
            return {service.name for service in
                    table(Layout(STATE, options), Rest())}
        whole = names(Options(router=True))
        assert {'fastboot-agent@h2', 'neutron-l3'} <= whole
        small = names(Options(hosts=1, fastboot=False))
        assert small < whole
        assert not [name for name in small if 'h2' in name
                    or name.startswith('fastboot') or 'l3' in name]


class TestLayout:
    def test_options_are_kept(self, tmp_path):
        layout = Layout(tmp_path, Options(1, True, False, '1gbit'))
        layout.save()
        assert load(tmp_path) == layout

    def test_without_options_there_are_defaults(self, tmp_path):
        assert load(tmp_path) == Layout(tmp_path)

    def test_deep_state_is_refused(self):
        Layout(pathlib.Path('/' + 'x' * 60)).check()
        with pytest.raises(ValueError, match='at most [0-9]+ characters'):
            Layout(pathlib.Path('/' + 'x' * 90)).check()

    def test_addresses(self):
        assert [host.address for host in Layout(STATE).nodes] == [
            '10.199.0.1', '10.199.0.11', '10.199.0.12']

    def test_nodes_change_with_the_number_of_hosts(self):
        """Their /etc/hosts does."""
        one, two = (node.fingerprint(Layout(STATE, Options(n)), Node('h1', 1))
                    for n in (1, 2))
        assert one != two

    def test_hosts_only_have_libvirt(self):
        layout = Layout(STATE)
        assert '/var/lib/libvirt' in node.setup_script(
            layout, layout.hosts[0])
        assert '/var/lib/libvirt' not in node.setup_script(
            layout, layout.control)


class TestAnswers:
    def test_moment(self):
        assert moment('2026-01-02T03:04:05.678901') == 1767323045
        assert moment('2026-01-02 03:04:05') == 1767323045
        assert moment(None) == 0

    def test_counters(self):
        text = ('# pxname,svname,bin,bout,\n'
                'glance,FRONTEND,10,2000,\n'
                'glance,control,10,2000,\n'
                'nova,FRONTEND,1,3,\n\n')
        assert proxy_counters.parse(text) == {'glance': 2000, 'nova': 3}
