# SPDX-License-Identifier: Apache-2.0
"""What tells that a boot is over."""

import types

import pytest
from oslo_config import cfg

from fastboot_common import exception
from fastboot_common.conf import capture as conf
from fastboot_glance import endings


def options(**values):
    config = cfg.ConfigOpts()
    config.register_opts(conf.OPTS, group=conf.GROUP)
    config([], default_config_files=[])
    for name, value in values.items():
        config.set_override(name, value, group=conf.GROUP)
    return config.capture


def view(seconds=0.0, console=b'', unique=0, idle=0.0, agent=None):
    return endings.View(seconds, agent, console, unique, idle)


class FakeAgent:
    def __init__(self, answers):
        self.answers = answers
        self.asked = 0

    def ping(self, seconds):
        self.asked += 1
        return self.answers


@pytest.mark.parametrize('console', [
    b'\r\nDebian GNU/Linux 12 deb ttyS0\r\n\r\ndeb login: ',
    b'deb login:', b'\x1b[0mdeb login: \r\n',
    b'deb login: [   20.123456] random: crng init done\r\n',
])
def test_console_prompt(console):
    assert endings.Console(options()).over(view(console=console))


@pytest.mark.parametrize('console', [
    b'', b'Last login: Mon Nov 21', b'logind', b'login', b'login: root',
    b'[    3.1] systemd-logind: new seat\r\n',
])
def test_console_no_prompt(console):
    assert not endings.Console(options()).over(view(console=console))


def test_console_own_pattern():
    driver = endings.Console(options(console_pattern='^READY$'))
    assert driver.over(view(console=b'READY'))
    assert not driver.over(view(console=b'login: '))


def test_console_bad_pattern():
    with pytest.raises(exception.ConfigError):
        endings.Console(options(console_pattern='('))


@pytest.mark.parametrize('mib, idle, over', [
    (8, 120, True), (7, 120, False), (8, 119.9, False), (0, 600, False)])
def test_quiet(mib, idle, over):
    driver = endings.Quiet(options())
    assert driver.over(view(unique=mib << 20, idle=idle)) is over


def test_agent_is_asked_once_a_second():
    agent = FakeAgent(False)
    driver = endings.Agent(options())
    for tenth in range(30):
        assert not driver.over(view(seconds=tenth / 10, agent=agent))
    assert agent.asked == 3
    agent.answers = True
    assert driver.over(view(seconds=3.5, agent=agent))


def test_load():
    found = endings.load(options(end=['quiet', 'console']))
    assert {name: type(driver) for name, driver in found.items()} == {
        'quiet': endings.Quiet, 'console': endings.Console}


@pytest.mark.parametrize('end', [[], ['agent', 'moon']])
def test_load_unknown(end):
    with pytest.raises(exception.ConfigError):
        endings.load(types.SimpleNamespace(end=end))


def test_every_driver_can_be_configured():
    choices = next(
        option for option in conf.OPTS if option.name == 'end'
    ).type.item_type.choices
    assert set(choices) == set(endings.DRIVERS)
