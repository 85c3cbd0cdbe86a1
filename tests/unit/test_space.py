# SPDX-License-Identifier: Apache-2.0
"""What goes when space is short, and in which order."""

import pytest

from fastboot_common import exception
from fastboot_nova.agent import space


class Host:
    """Volumes and mirror that take some bytes, a part of which can go."""

    def __init__(self, path, volumes=0, mirror=0, idle=0):
        self.path = path
        self.bytes = [volumes, mirror]
        self.idle = idle
        self.asked = []

    def held(self):
        return tuple(self.bytes)

    def make_room(self, wanted, evicted):
        self.asked.append(wanted)
        freed, self.idle = min(wanted, self.idle), max(0, self.idle - wanted)
        self.bytes[0] -= freed
        return freed


class Beside:
    def __init__(self, count):
        self.count = count
        self.asked = []

    def held(self):
        return self.count

    def make_room(self, wanted):
        self.asked.append(wanted)
        freed = min(wanted, self.count)
        self.count -= freed
        return freed


def make(path, quota, beside, **options):
    found = space.Space(Host(path, **options), 0, print, quota)
    found.beside = Beside(beside)
    return found


def test_images_go_first(tmp_path):
    found = make(tmp_path, 100, 60, volumes=80, mirror=10, idle=30)
    found.keep()
    assert found._host.asked == [50]
    assert found.beside.asked == [20]
    assert not found._above()
    found.keep()
    assert len(found._host.asked) == 1, 'all is well'


def test_what_is_beside_counts(tmp_path):
    found = make(tmp_path, 100, 60, volumes=10)
    assert found.is_roomy(30) and not found.is_roomy(31)
    found.demand()
    found = make(tmp_path, 100, 10, volumes=200)
    with pytest.raises(exception.NoSpace, match='quota'):
        found.demand()
    assert found.beside.held() == 0


def test_without_a_quota_only_what_is_asked_for_goes(tmp_path):
    found = make(tmp_path, 0, 60, volumes=10, idle=5)
    found.keep()
    assert found.beside.held() == 60
    found.make(7)
    assert found.beside.asked == [2]


def test_without_microvms(tmp_path):
    found = make(tmp_path, 10, 0, volumes=20, idle=20)
    found.beside = None
    found.keep()
    assert found._host.asked == [10]
