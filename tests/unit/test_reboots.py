# SPDX-License-Identifier: Apache-2.0
"""Which guests are started that reset themselves."""

import json
import types

import pytest

libvirt = pytest.importorskip('libvirt')

from fastboot_nova.agent import reboots  # noqa: E402
from fastboot_nova.microvm.pool import Fate  # noqa: E402

ONE = 'aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee'


class Guest:
    """A domain that is defined, and does not run; a connection to it."""

    created = 0

    def name(self):
        return 'one'

    def UUIDString(self):
        return ONE

    def isActive(self):
        return bool(self.created)

    def create(self):
        self.created += 1

    def isAlive(self):
        return True

    def lookupByUUIDString(self, uuid):
        return self


@pytest.fixture
def guest():
    return Guest()


def hear(guest, fate):
    """One that looks after the guest, and heard of its reset."""
    found = reboots.Reboots('', lambda: None, lambda uuid: fate[0])
    found._connection = guest
    found._ended(guest, guest, 'SHUTDOWN', 0, 0,
                 json.dumps({'guest': True, 'reason': 'guest-reset'}), None)
    found._hear()
    found._try(ONE)
    return found


def test_a_server(guest):
    looker = hear(guest, [Fate.NONE])
    assert guest.created == 1
    assert not looker._due


def test_one_that_failed_is_booted_by_who_resumed_it(guest):
    """Nova would find it running, from the disk that it removes."""
    looker = hear(guest, [Fate.FAILED])
    assert not guest.created
    assert not looker._due


@pytest.mark.parametrize('later, created', [
    (Fate.NONE, 1), (Fate.FAILED, 0)])
def test_while_it_is_resumed(guest, later, created):
    fate = [Fate.COMING]
    looker = hear(guest, fate)
    assert not guest.created
    fate[0] = later
    looker._try(ONE)
    assert guest.created == created
    assert not looker._due


def test_one_that_nova_is_about_to_end(guest):
    """It would be copied, or removed, while it runs."""
    looker = reboots.Reboots('', lambda: None)
    looker._connection = guest
    reset = (guest, guest, 'SHUTDOWN', 0, 0,
             json.dumps({'guest': True, 'reason': 'guest-reset'}), None)
    looker._ended(*reset)
    looker._hear()
    looker.leave(ONE)
    assert not looker._due
    # What QEMU says late is of the same end.
    looker._ended(*reset)
    looker._hear()
    assert not looker._due
    looker.follow(ONE)
    looker._ended(*reset)
    looker._hear()
    assert looker._due


def test_one_that_was_left_long_ago(guest, monkeypatch):
    looker = reboots.Reboots('', lambda: None)
    looker.leave(ONE)
    now = reboots.time.monotonic()
    monkeypatch.setattr(reboots, 'time', types.SimpleNamespace(
        monotonic=lambda: now + reboots._PATIENCE + 1))
    looker._heard.put(ONE)
    looker._hear()
    assert looker._due
    looker.leave('two')
    assert list(looker._left) == ['two']
