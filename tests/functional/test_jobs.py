# SPDX-License-Identifier: Apache-2.0
"""The jobboard on each server that it can have, all of them real."""

import threading
import uuid

import brokers
import pytest
from oslo_config import cfg

pytest.importorskip('taskflow')

from fastboot_common import exception
from fastboot_common.conf import jobboard
from fastboot_glance import jobs

#: Seconds of a claim, short so that tests see the end of one.
SECONDS = 6


#: The default gates; the others take minutes.
KINDS = ['redis', pytest.param('etcd', marks=pytest.mark.slow),
         pytest.param('zookeeper', marks=pytest.mark.slow)]


@pytest.fixture(scope='module', params=KINDS)
def server(request, tmp_path_factory):
    with getattr(brokers, request.param)(
            tmp_path_factory.mktemp(request.param)) as found:
        found.name = request.param
        yield found


def configuration(url, namespace, **options):
    conf = cfg.ConfigOpts()
    conf.register_opts(jobboard.OPTS, group=jobboard.GROUP)
    conf([], default_config_files=[])
    for name, value in {
            'connection': url, 'namespace': namespace, 'timeout': 2,
            'claim_seconds': SECONDS, **options}.items():
        conf.set_override(name, value, group=jobboard.GROUP)
    return conf


@pytest.fixture
def boards(server):
    """Makes boards of one namespace; each has its own connection."""
    namespace = f'test-{uuid.uuid4().hex[:8]}'
    made = []

    def make(**options):
        made.append(jobs.Board(configuration(server.url, namespace,
                                             **options)))
        return made[-1]

    yield make
    for board in made:
        board.close()


def test_a_job_an_image(boards):
    one, two = boards(), boards()
    assert one.post('image-a', 'test')
    assert not two.post('image-a', 'again')
    assert two.post('image-b', 'test')
    assert [job.image_id for job in one.jobs()] == ['image-a', 'image-b']
    # A wish for more is not covered by one for less.
    assert two.post('image-a', 'refresh', force=True)
    assert not one.post('image-a', 'refresh', force=True)
    assert [job.force for job in two.jobs()] == [False, False, True]


def test_claimed_by_one(boards):
    one, two = boards(), boards()
    one.post('image-a', 'test')
    job, = one.jobs()
    with one.claim(job, 'one') as claim:
        assert two.claim(two.jobs()[0], 'two') is None
        assert not two.post('image-a', 'again')
        claim.release()
    with two.claim(two.jobs()[0], 'two') as claim:
        assert one.claim(one.jobs()[0], 'one') is None
        claim.finish()
    assert one.jobs() == two.jobs() == []
    assert one.post('image-a', 'once more')


def test_two_jobs_of_an_image(boards):
    """Two posted at the same time: never in two builders' hands."""
    one, two = boards(), boards()
    assert one.post('image-a', 'test')
    assert one.post('image-a', 'refresh', force=True)
    first, second = one.jobs()
    with one.claim(first, 'one') as claim:
        assert two.claim(second, 'two') is None
        claim.finish()
    # It was put back, as it wants something of its own.
    again, = two.jobs()
    assert again.force
    with two.claim(again, 'two') as claim:
        claim.finish()
    assert one.jobs() == []


def test_a_later_job_of_an_image_is_dropped(boards, monkeypatch):
    one = boards()
    assert one.post('image-a', 'test')
    with monkeypatch.context() as patch:
        patch.setattr(one, 'jobs', list)  # as if both had looked before
        assert one.post('image-a', 'at the same time')
    first, second = one.jobs()
    assert one.claim(second, 'one') is None
    assert one.jobs() == [first]


def test_bakes_are_jobs_of_their_own(boards):
    one, two = boards(), boards()
    assert one.post('image-a', 'test')
    assert one.post('image-a', 'test', platform='p1')
    assert one.post('image-a', 'test', platform='p2')
    assert not two.post('image-a', 'again', platform='p2')
    build, first, second = two.jobs()
    assert (build.platform, first.platform, second.platform) == (
        '', 'p1', 'p2')
    # Two bakes do not mind each other; a build does.
    held = [one.claim(first, 'b1'), two.claim(second, 'b2')]
    assert all(held)
    assert one.claim(build, 'b3') is None
    for claim in held:
        claim.release()
    claim = two.claim(build, 'b3')
    assert claim
    assert one.claim(first, 'b1') is None
    claim.finish()
    assert [job.platform for job in one.jobs()] == ['p1', 'p2']


def test_a_claim_is_kept_as_long_as_it_is_held(boards):
    one, two = boards(), boards()
    one.post('image-a', 'test')
    with one.claim(one.jobs()[0], 'one') as claim:
        assert not claim.cancel.wait(SECONDS * 1.5)
        assert two.claim(two.jobs()[0], 'two') is None
        claim.finish()


def test_a_claim_of_the_dead_runs_out(boards, server):
    one, two = boards(), boards()
    one.post('image-a', 'test')
    assert one.claim(one.jobs()[0], 'one')  # and never extended
    if server.name == 'zookeeper':
        one.close()
    claims = []

    def claim():
        claims.append(two.claim(two.jobs()[0], 'two'))
        return claims[-1]

    brokers.wait_for(claim, 'claimed by the other', 3 * SECONDS)
    claims[-1].finish()


def test_a_lost_claim_is_known(boards, server):
    """The server hangs for longer than a claim lasts."""
    one = boards()
    one.post('image-a', 'test')
    with one.claim(one.jobs()[0], 'one') as claim:
        server.freeze()
        try:
            assert claim.cancel.wait(SECONDS * 3)
            assert claim.lost
        finally:
            server.thaw()


def test_server_away_and_back(boards, server):
    one = boards()
    one.post('image-a', 'test')
    server.freeze()
    try:
        if server.name != 'zookeeper':  # its client waits longer
            with pytest.raises(exception.Unavailable):
                one.jobs()
    finally:
        server.thaw()
    brokers.wait_for(lambda: attempt(one), 'the jobs')
    claim = one.claim(one.jobs()[0], 'one')
    claim.finish()
    assert one.jobs() == []


def attempt(board):
    try:
        return board.jobs()
    except exception.Unavailable:
        return None


def test_many_builders_one_winner(boards):
    boards()  # fail early
    one = boards()
    for number in range(5):
        one.post(f'image-{number}', 'test')
    won, barrier = [], threading.Barrier(4)

    def build(name):
        board = boards()
        barrier.wait(30)
        for job in board.jobs():
            claim = board.claim(job, name)
            if claim:
                won.append(job.image_id)

    threads = [threading.Thread(target=build, args=(f'builder-{number}',))
               for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(won) == [f'image-{number}' for number in range(5)]


@pytest.mark.parametrize('url', [
    '', 'redis', 'mysql://127.0.0.1/', 'redis://', 'redis://127.0.0.1:x/',
    'http://127.0.0.1:1'])
def test_urls_without_sense(url):
    with pytest.raises(exception.ConfigError, match='jobboard'):
        jobs.Board(configuration(url, 'test'))


@pytest.mark.parametrize('scheme', ['redis', 'etcd', 'zookeeper'])
def test_nobody_there(scheme):
    board = jobs.Board(configuration(
        f'{scheme}://127.0.0.1:{brokers.free_port()}', 'test'))
    with pytest.raises(exception.Unavailable, match='jobboard'):
        board.jobs()
    with pytest.raises(exception.Unavailable, match='jobboard'):
        board.post('image', 'test')
    board.close()
