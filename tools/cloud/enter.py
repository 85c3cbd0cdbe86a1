# SPDX-License-Identifier: Apache-2.0
"""Start a program in the namespaces of another process, detached.

Run as `python3 -I -S enter.py PID LOG FILE RECORD PROGRAM [WORD ...]`; PID
0: in this process' own namespaces. RECORD, an object in JSON, is written to
FILE with the new process' id and start time as seen here. Only then the
program begins: whatever is killed when, none runs without a record. The
process leads a session of its own; its parent is the first process of its
PID namespace.

Not nsenter, which stays behind as a parent that passes no signals on.
"""

import ctypes
import json
import os
import signal
import sys

NAMESPACES = ('ipc', 'uts', 'net', 'pid', 'mnt')


def join(pid: int) -> None:
    """Enter all namespaces of `pid`; the PID one counts for children.

    :raises OSError: not possible.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    fds = [os.open(f'/proc/{pid}/ns/{name}', os.O_RDONLY | os.O_CLOEXEC)
           for name in NAMESPACES]
    for fd in fds:
        if libc.setns(fd, 0):
            raise OSError(ctypes.get_errno(), f'setns to process {pid}')


def become(log: int, argv: list[str]) -> None:
    """Turn into the program; the log is its standard output and error."""
    os.setsid()
    os.chdir('/')
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    # Ignored signals are inherited, and Python ignores this one.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f'{argv[0]}: {error.strerror}\n'.encode())
        os._exit(127)


def note(proc: int, pid: int, name: str, record: dict[str, object]) -> None:
    """Write the record.

    :param proc: the directory /proc from before another one was entered.
    """
    fd = os.open(f'{pid}/stat', os.O_RDONLY, dir_fd=proc)
    stat = os.read(fd, 4096).decode()
    os.close(fd)
    start = int(stat.rpartition(')')[2].split()[19])
    with open(f'{name}.new', 'w') as file:
        json.dump({**record, 'pid': pid, 'start': start}, file)
    os.rename(f'{name}.new', name)


def main(argv: list[str]) -> None:
    """Run the program."""
    target, log_name, file, record, *command = argv
    log = os.open(log_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    proc = os.open('/proc', os.O_RDONLY)
    if target != '0':
        join(int(target))
    gate, opener = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        if os.read(gate, 1):
            become(log, command)
        os._exit(1)
    note(proc, pid, file, json.loads(record))
    os.write(opener, b'.')


if __name__ == '__main__':
    main(sys.argv[1:])
