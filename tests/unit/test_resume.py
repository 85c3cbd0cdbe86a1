# SPDX-License-Identifier: Apache-2.0
"""What a resume does to a domain that is not there in time."""

import threading
import time
import types

import pytest

libvirt = pytest.importorskip('libvirt')

from fastboot_common.microvm import document  # noqa: E402
from fastboot_nova.microvm import resume  # noqa: E402


class Domain:
    """Nothing runs before `there`, and ending it takes a while."""

    def __init__(self, there=0.0):
        self.begun = time.monotonic()
        self.there = there
        self.ending = threading.Event()
        self.ended = threading.Event()

    def destroy(self):
        if time.monotonic() - self.begun < self.there:
            raise libvirt.libvirtError('it is not running')
        self.ending.set()
        time.sleep(0.3)
        self.ended.set()


def words_of_libvirt():
    raise libvirt.libvirtError('it ended')


def words_that_are_no_text():
    """libvirt-python's call, when its message cannot be decoded."""
    try:
        bytes([0xb9]).decode()
    except UnicodeDecodeError as error:
        raise SystemError('a result with an exception set') from error


@pytest.mark.parametrize('fail', [words_of_libvirt, words_that_are_no_text])
def test_whatever_libvirt_says_is_a_failure(fail):
    """Nova would give the server up otherwise, and not boot it."""
    one = resume._Resume.__new__(resume._Resume)
    one._phase = 'load'
    with pytest.raises(resume.ResumeFailed) as found, one._failing():
        fail()
    assert found.value.phase == 'load'


def test_what_is_not_foreseen_in_a_definition(monkeypatch):
    """Nothing was done; the server boots."""
    def fail(xml, machine):
        raise StopIteration

    monkeypatch.setattr(resume.clone, 'instance', fail)
    lane = types.SimpleNamespace(
        description=types.SimpleNamespace(machine=None))
    with pytest.raises(resume.clone.Unsuitable, match='StopIteration'):
        resume.resume(None, lane, types.SimpleNamespace(xml=''))


def test_late_before_there_is_a_qemu():
    domain = Domain(there=0.4)
    with resume._bounded(domain, time.monotonic() - 1):
        assert domain.ended.wait(20)


def test_nothing_is_ended_when_it_is_over():
    domain = Domain()
    with resume._bounded(domain, time.monotonic()):
        assert domain.ending.wait(20)
    assert domain.ended.is_set(), 'not later, when Nova boots the same domain'


def test_in_time():
    domain = Domain()
    begun = time.monotonic()
    with resume._bounded(domain, begun + 60):
        pass
    assert time.monotonic() - begun < 20
    assert not domain.ending.is_set()


@pytest.mark.parametrize('slow, phase', [
    ('prepare', 'define'), ('lookup', resume.BEGIN)])
def test_what_is_done_first_takes_too_long(tmp_path, slow, phase):
    """Nothing is loaded any more, and the µVM is not the reason.

    A disk that was not touched stays: the server boots from it.
    """
    disk, gone = tmp_path / 'disk', []
    disk.touch()
    domain = types.SimpleNamespace(undefineFlags=gone.append)

    def unknown(known):
        time.sleep(0.1 * (slow == 'lookup'))
        raise libvirt.libvirtError('no domain')

    element = document.parse(
        f"<domain><disk><source file='{disk}'/></disk></domain>")[0]
    one = resume._Resume(
        types.SimpleNamespace(lookupByUUIDString=unknown,
                              defineXML=lambda xml: domain),
        None, resume.Spec('', '', 0, deadline=0.05),
        types.SimpleNamespace(uuid='x', disk=element), lambda phase: None)
    with pytest.raises(resume.ResumeFailed) as found:
        one.run(lambda: time.sleep(0.1))
    assert found.value.phase == phase
    assert bool(gone) == (slow == 'prepare')
    assert disk.exists() == (slow == 'lookup')
