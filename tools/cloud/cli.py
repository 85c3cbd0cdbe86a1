# SPDX-License-Identifier: Apache-2.0
"""The command line of tools/sandbox."""

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from cloud import config, node, packages
from cloud.layout import CONTROL, REPOSITORY, Layout, Options, load
from cloud.network import Network, enter
from cloud.process import rss
from cloud.sandbox import Sandbox
from cloud.services import environment
from cloud.steps import CancelledError, Clock, StepError

_SHARED_STATE = REPOSITORY / '.state' / 'sandbox'


def _up(args: argparse.Namespace, clock: Clock) -> int:
    layout = Layout(args.state_dir, Options(
        args.hosts, args.router, args.fastboot, args.link_rate))
    layout.check()
    sandbox = Sandbox(layout, clock)
    with sandbox.locked():
        sandbox.up(args.fresh)
    clock.say('up')
    tool = pathlib.Path(sys.argv[0])
    print(f'''
  . {layout.openrc}
  openstack server list

A node's namespaces: {tool} exec {CONTROL}|{"|".join(
    host.name for host in layout.hosts)} COMMAND
A guest: openstack server create --key-name sandbox --network private …
         {tool} exec {CONTROL} ssh root@ADDRESS
Logs:    {layout.log}; {tool} status; {tool} down''')
    return 0


def _down(args: argparse.Namespace, clock: Clock) -> int:
    sandbox = Sandbox(load(args.state_dir), clock)
    with sandbox.locked():
        sandbox.down()
        if args.wipe:
            sandbox.wipe()
    clock.say('down')
    return 0


def _status(args: argparse.Namespace, clock: Clock) -> int:
    """0: all is well; 3: something should run and does not."""
    sandbox = Sandbox(load(args.state_dir), clock)
    records = {record.name: record for record in sandbox.records}
    missing = 0
    nodes = [node.keeper(which) for which in sandbox.layout.nodes]
    print(f'{"SERVICE":24} {"NODE":8} {"STATE":8} {"PID":>7} {"UP":>8} '
          f'{"MiB":>6}')
    for name in [*nodes, *sandbox.services]:
        record = records.get(name)
        if record and record.alive:
            print(f'{name:24} {record.node or "-":8} {"running":8} '
                  f'{record.pid:7} {time.time() - record.began:6.0f} s '
                  f'{rss(record.pid) >> 20:6}')
        else:
            missing += 1
            print(f'{name:24} {"":8} {"ended" if record else "stopped"}')
    return 3 if missing else 0


def _restart(args: argparse.Namespace, clock: Clock) -> int:
    sandbox = Sandbox(load(args.state_dir), clock)
    with sandbox.locked():
        for name in args.service:
            begun = time.monotonic()
            if args.command in ('stop', 'restart'):
                sandbox.stop(name)
            if args.command in ('start', 'restart'):
                sandbox.start(name)
            clock.say(f'{args.command} {name}', time.monotonic() - begun)
    return 0


def _install(args: argparse.Namespace, clock: Clock) -> int:
    sandbox = Sandbox(load(args.state_dir), clock)
    with sandbox.locked():
        new = packages.fastboot(sandbox.layout)
    clock.say('fastboot is installed' if new else 'nothing has changed')
    return 0


def _link_rate(args: argparse.Namespace, clock: Clock) -> int:
    layout = load(args.state_dir)
    rate = '' if args.rate == 'off' else args.rate
    layout = Layout(layout.state,
                    dataclasses.replace(layout.options, link_rate=rate))
    sandbox = Sandbox(layout, clock)
    with sandbox.locked():
        Network(layout, sandbox.records).shape(rate)
        layout.save()
    return 0


def _logs(args: argparse.Namespace, clock: Clock) -> int:
    sandbox = Sandbox(load(args.state_dir), clock)
    name = sandbox.service(args.service).name
    follow = ['-F'] if args.follow else []
    os.execvp('tail', ['tail', '-n', str(args.lines), *follow,
                       str(sandbox.layout.log / f'{name}.log')])


def _exec(args: argparse.Namespace, clock: Clock) -> int:
    layout = load(args.state_dir)
    sandbox = Sandbox(layout, clock)
    variables = environment(layout)
    for line in config.files(layout)[layout.openrc].splitlines():
        name, _, value = line.removeprefix('export ').partition('=')
        if name.startswith('OS_'):
            variables[name] = value
    os.environ.update(variables)
    command = [*enter(sandbox.records, args.node), '--', *args.words]
    os.execvp(command[0], command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='sandbox', description='A real OpenStack on this machine, with '
        'two compute hosts, for tests and demos. Needs root.')
    parser.add_argument(
        '--state-dir', type=pathlib.Path, metavar='DIR',
        default=os.environ.get('FASTBOOT_SANDBOX') or _SHARED_STATE,
        help='where everything is (default: $FASTBOOT_SANDBOX, or '
             '.state/sandbox)')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND',
                                     required=True)
    _add_up(commands.add_parser(
        'up', help='bring it up, or up to date, or in order again'))

    down = commands.add_parser('down', help='stop everything')
    down.add_argument('--wipe', action='store_true',
                      help='also remove all but the installed software')
    down.set_defaults(function=_down)

    status = commands.add_parser(
        'status', help='what runs; status 3 if something does not')
    status.set_defaults(function=_status)

    for name in ('restart', 'stop', 'start'):
        command = commands.add_parser(name, help=f'{name} services')
        command.add_argument('service', nargs='+')
        command.set_defaults(function=_restart)

    install = commands.add_parser(
        'install', help='install fastboot from the checkout')
    install.set_defaults(function=_install)

    rate = commands.add_parser(
        'link-rate', help='limit each host\'s management link, both ways')
    rate.add_argument('rate', help='as tc writes it, such as 1gbit, or off')
    rate.set_defaults(function=_link_rate)

    logs = commands.add_parser('logs', help='the log of a service')
    logs.add_argument('service')
    logs.add_argument('-f', '--follow', action='store_true')
    logs.add_argument('-n', '--lines', type=int, default=40)
    logs.set_defaults(function=_logs)

    execute = commands.add_parser(
        'exec', help='run a command in the namespaces of a node')
    execute.add_argument('node', help='control, h1 or h2')
    execute.add_argument('words', nargs=argparse.REMAINDER,
                         metavar='COMMAND')
    execute.set_defaults(function=_exec)
    return parser


def _add_up(up: argparse.ArgumentParser) -> None:
    # After the command, too; without a default, which would win there.
    up.add_argument('--state-dir', type=pathlib.Path,
                    default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    up.add_argument('--hosts', type=int, choices=(1, 2), default=2,
                    help='compute hosts (default: %(default)s)')
    up.add_argument('--router', action='store_true',
                    help='with an L3 agent: routers and floating IPs')
    up.add_argument('--no-fastboot', dest='fastboot', action='store_false',
                    help='plain OpenStack')
    data = up.add_mutually_exclusive_group()
    data.add_argument('--keep', dest='fresh', action='store_false',
                      help='with the data of the last run (default)')
    data.add_argument('--fresh', action='store_true',
                      help='with new databases, without images and servers')
    up.add_argument('--link-rate', default='', metavar='RATE',
                    help='limit each host\'s management link, both ways, '
                         'such as 1gbit')
    up.set_defaults(function=_up, fresh=False)


def main(argv: Sequence[str]) -> int:
    """Run the program; return its exit status."""
    args = _parser().parse_args(argv)
    args.state_dir = pathlib.Path(args.state_dir).absolute()
    if os.geteuid():
        print('sandbox: only root can make namespaces', file=sys.stderr)
        return 1
    os.environ['PATH'] += ':/usr/sbin:/sbin'
    os.umask(0o022)
    try:
        return int(args.function(args, Clock()))
    except (StepError, ValueError, OSError) as error:
        print(f'sandbox: {error}', file=sys.stderr)
    except (KeyboardInterrupt, CancelledError):
        print('sandbox: interrupted; "sandbox up" goes on, "sandbox down" '
              'cleans up', file=sys.stderr)
        return 130
    return 1
