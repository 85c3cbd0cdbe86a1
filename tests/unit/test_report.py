# SPDX-License-Identifier: Apache-2.0
"""The report: figures of small repositories, and pages of hostile names."""

import html.parser
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastboot_common import (
    exception,
    extents,
    manifest,
    publish,
    report,
    repository,
    trace,
)
from fastboot_common.cli import main
from fastboot_common.store.local import LocalStore

BLOCK = 4096
HOSTILE = '</script><script>alert("x")</script><!--\'&amp;\u2028\ud800'

runs = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)),
                max_size=12)


def make_runs(pairs):
    array = np.array(pairs, np.int64).reshape(-1, 2)
    return report.Runs(array[:, 0], array[:, 1])


def members(pairs):
    return {number for first, count in pairs
            for number in range(first, first + count)}


@given(runs, runs)
def test_runs_are_sets(one, two):
    first, second = make_runs(one), make_runs(two)
    assert first.total == len(members(one))
    assert first.shared(second) == len(members(one) & members(two))
    assert report.union([first, second]).total == len(
        members(one) | members(two))
    edges = np.arange(-1, 240)
    assert first.below(edges).tolist() == [
        sum(number < edge for number in members(one)) for edge in edges]


@given(st.lists(runs, max_size=4))
def test_similarity_as_squirrel_defines_it(sets):
    sets_of_numbers = [members(one) for one in sets]
    total = sum(map(len, sets_of_numbers))
    repeated = 0
    for number in set().union(*sets_of_numbers):
        times = sum(number in one for one in sets_of_numbers)
        repeated += times if times > 1 else 0
    expected = repeated / total if total else 0
    assert report.similarity([make_runs(one) for one in sets]) \
        == pytest.approx(expected)


def test_similarity_extremes():
    one = make_runs([(5, 10), (40, 2)])
    assert report.similarity([one, one, one]) == 1
    assert report.similarity([one, make_runs([(15, 25)])]) == 0


@pytest.fixture
def target(tmp_path):
    path = tmp_path / 'repository'
    path.mkdir()
    store = LocalStore(path)
    repository.init(store, BLOCK)
    return repository.Repository(store)


@pytest.fixture
def add(target, tmp_path):
    """Publish an image: ``add(id, content, boots)``.

    `content`: a number for each block, 0 for zeros; the same number is the
    same block. `boots`: a list of the blocks read, for each boot.
    """
    def publish_image(image_id, content, boots=(), **values):
        raw = tmp_path / 'raw'
        raw.write_bytes(b''.join(
            number.to_bytes(2, 'little') * (BLOCK // 2)
            for number in content))
        reads = trace.merge([np.array(
            [(at * 1000, block * BLOCK, BLOCK, 0)
             for at, block in enumerate(boot)], trace.DTYPE)
            for boot in boots])
        draft = manifest.Manifest(
            image_id, values.pop('name', image_id), len(content) * BLOCK,
            BLOCK, '', [], np.empty(0, extents.DTYPE), trace=reads,
            boot=trace.boot_set(reads, BLOCK, len(content) * BLOCK),
            **values)
        publisher = publish.Publisher(target, tmp_path / 'cache')
        return publisher.publish(raw, draft).image

    return publish_image


@pytest.fixture
def three(add):
    """Known sharing: a and b four blocks (two of the boots), c nothing."""
    add('a', [1, 2, 3, 4, 5, 0, 0, 6], [[0, 1, 2], [2, 0, 7]],
        capture={'state': 'booted', 'seconds': [3.5, 3], 'end': 'agent'})
    add('b', [0, 1, 2, 3, 4, 21, 22, 0, 0, 0], [[1, 2, 5, 9]])
    add('c', [31, 31, 31, 32], [])


def test_matrix_of_known_images(target, three):
    found = report.gather(target)
    kib = [[value // BLOCK for value in row]
           for row in found['matrix']['whole']['shared_bytes']]
    assert kib == [[6, 4, 0], [4, 6, 0], [0, 0, 2]]
    kib = [[value // BLOCK for value in row]
           for row in found['matrix']['boot']['shared_bytes']]
    assert kib == [[4, 2, 0], [2, 3, 0], [0, 0, 0]]
    assert found['matrix']['whole']['union_bytes'] == 10 * BLOCK
    assert found['matrix']['whole']['cross_similarity'] == round(8 / 14, 4)
    assert found['matrix']['boot']['cross_similarity'] == round(4 / 7, 4)


def test_sums_add_up(target, three):
    found = report.gather(target)
    totals = found['totals']
    for image in found['images']:
        sources, cells = image['sources'], image['map']
        assert sum(row['boot_bytes'] for row in sources) \
            == image['boot_bytes']
        assert sum(row['data_bytes'] for row in sources) \
            == image['data_bytes']
        assert sum(cells['data']) * BLOCK == image['data_bytes']
        assert sum(cells['blocks']) * BLOCK == image['virtual_bytes']
        assert sum(map(sum, cells['boot'].values())) * BLOCK \
            == image['boot_bytes']
        for curve in image['growth']:
            reads = [length for length, boot in zip(
                image['reads']['bytes'], image['reads']['boot'], strict=True)
                if boot == curve['boot']]
            assert curve['bytes'][-1] == sum(reads)
            assert curve['bytes'] == sorted(curve['bytes'])
            assert curve['unique_bytes'] == sorted(curve['unique_bytes'])
    assert totals['boot_bytes'] == sum(
        image['boot_bytes'] for image in found['images']) == 7 * BLOCK
    assert totals['boot_unique_bytes'] == 5 * BLOCK
    assert totals['unique_bytes'] == 10 * BLOCK
    assert totals['data_bytes'] == 16 * BLOCK
    assert 0 < totals['boot_stored_bytes'] < totals['stored_bytes'] \
        < found['repository']['pack_bytes']


def test_blocks_come_from_the_first_that_brought_them(target, three):
    first, second, _third = report.gather(target)['images']
    assert [(row['origin'], row['boot_bytes'] // BLOCK,
             row['data_bytes'] // BLOCK) for row in first['sources']] \
        == [(1, 4, 6)]
    assert [(row['origin'], row['boot_bytes'] // BLOCK,
             row['data_bytes'] // BLOCK) for row in second['sources']] \
        == [(2, 1, 2), (1, 2, 4)]
    assert second['reads']['origin'] == [1, 1, 2, -1]
    assert second['reads']['offset'] == [1 * BLOCK, 2 * BLOCK, 5 * BLOCK,
                                         9 * BLOCK]


def test_removed_image_keeps_its_credit(target, three):
    target.remove('a')
    found = report.gather(target)
    assert [image['id'] for image in found['images']] == ['b', 'c']
    assert found['origins']['1'] == {'name': 'a', 'removed': True}
    assert found['images'][0]['sources'][1]['origin'] == 1


def test_capture_is_told_and_cleaned(target, add):
    add('odd', [1], capture={
        'state': 'booted', 'seconds': [1, 'x', float('nan'), -1, True, 2.5],
        'devices': {'machine': 'q35'}, 'unknown': object.__name__})
    assert report.gather(target)['images'][0]['capture'] == {
        'state': 'booted', 'reason': None, 'end': None,
        'devices': "{'machine': 'q35'}", 'seconds': [1.0, 2.5]}


def test_many_reads_are_thinned_and_said_so(target, add, monkeypatch):
    monkeypatch.setattr(report, '_POINTS', 10)
    add('long', [1, 2], [[0, 1] * 18])
    image = report.gather(target)['images'][0]
    assert image['reads']['every'] == 4
    assert {len(image['reads'][name]) for name in (
        'seconds', 'offset', 'bytes', 'boot', 'origin')} == {9}
    assert image['growth'][0]['bytes'][-1] == 36 * BLOCK


def test_choice_of_images(target, three, monkeypatch):
    assert [image['id'] for image in report.gather(
        target, ['c', 'a', 'a'])['images']] == ['a', 'c']
    with pytest.raises(exception.NotFound, match='nothing'):
        report.gather(target, ['nothing'])
    monkeypatch.setattr(report, 'IMAGES', 2)
    found = report.gather(target)
    assert [image['id'] for image in found['images']] == ['b', 'c']
    assert found['repository']['images'] == 3


def test_images_not_chosen_are_not_named(target, add):
    add('a', [1, 2], name='first')
    add('b', [1, 3], name='second')
    add('c', [7, 8], name='secret')
    assert report.gather(target, ['b'])['origins'] == {
        '1': {'name': 'first', 'removed': False},
        '2': {'name': 'second', 'removed': False}}
    assert 'secret' not in report.render(report.gather(target, ['b']))


def test_empty_repository(target):
    found = report.gather(target)
    assert found['images'] == []
    assert set(found['totals'].values()) == {0}
    assert embedded(report.render(found)) == found


class Page(html.parser.HTMLParser):
    """Collects the elements and the embedded data of a page."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.data = ''
        self._inside = False

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._inside = dict(attributes).get('id') == 'data'

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.data += data


def parse(text):
    page = Page()
    page.feed(text)
    page.close()
    return page


def embedded(text):
    return json.loads(parse(text).data)


def test_hostile_names_stay_data(target, add):
    clean = parse(report.render(report.gather(target)))
    add('i', [1, 2], [[0]], name=HOSTILE.replace('\ud800', ''),
        capture={'state': 'failed', 'reason': HOSTILE})
    found = report.gather(target, boots=[
        {'label': HOSTILE, 'phases': [{'name': HOSTILE, 'seconds': 1.0}]}])
    text = report.render(found)
    page = parse(text)
    assert page.tags == clean.tags
    assert json.loads(page.data) == found
    assert HOSTILE[:9] not in text.split('id="data">')[1].split('</script>')[
        0]


def test_page_loads_nothing(target, three):
    text = report.render(report.gather(target))
    for _tag, attributes in parse(text).tags:
        assert not {'src', 'href', 'srcset', 'action'} & attributes.keys()
    # A reference within the page is none to elsewhere.
    text = text.replace('url(#', '')
    for word in ('url(', '@import', 'fetch(', 'innerHTML', 'eval('):
        assert word not in text
    policy = next(attributes['content'] for tag, attributes
                  in parse(text).tags if attributes.get('http-equiv'))
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_read_boots(tmp_path):
    path = write(tmp_path / 'boots.json', [
        {'label': 'stock', 'phases': [{'name': 'copy', 'seconds': 2}],
         'bytes_over_link': 10, 'more': 1}])
    assert report.read_boots(path) == [
        {'label': 'stock', 'phases': [{'name': 'copy', 'seconds': 2.0}],
         'bytes_over_link': 10.0, 'missed_reads': None, 'disk_used': None}]


@pytest.mark.parametrize('text', [
    '', '{', '3', '[3]', '[{}]', '{"label": "x"}',
    '[{"label": "x", "phases": 3}]',
    '[{"label": "x", "phases": [{"name": "y", "seconds": "1"}]}]',
    '[{"label": "x", "phases": [{"name": "y", "seconds": NaN}]}]',
    '[{"label": "x", "phases": [{"name": "y", "seconds": -1}]}]',
    '[{"label": "x", "phases": [], "disk_used": []}]', '[' * 100000])
def test_read_boots_refuses(tmp_path, text):
    path = write(tmp_path / 'boots.json', text)
    with pytest.raises(exception.Invalid, match='boots.json'):
        report.read_boots(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(exception.NotFound, match='none.json'):
        report.read_boots(tmp_path / 'none.json')
    with pytest.raises(exception.NotFound, match='none'):
        report.read_bench(tmp_path / 'none')


def test_read_bench(tmp_path):
    write(tmp_path / 'b.json', [
        {'machine': {'cpus': 2}},
        {'name': 'rate', 'value': 3, 'unit': 'MB/s', 'bar': 2, 'op': '>=',
         'ok': True}])
    write(tmp_path / 'a.json', [
        {'name': 'x', 'value': 0.5, 'bar': None, 'ok': 'yes'}])
    write(tmp_path / 'notes.txt', 'nothing')
    assert report.read_bench(tmp_path) == [
        {'title': 'a', 'results': [
            {'name': 'x', 'value': 0.5, 'unit': '', 'bar': None,
             'op': '≤', 'ok': None}]},
        {'title': 'b', 'results': [
            {'name': 'rate', 'value': 3.0, 'unit': 'MB/s', 'bar': 2.0,
             'op': '≥', 'ok': True}]}]


@pytest.mark.parametrize('content', [
    {}, {'results': []}, 3, ['x'], [{'value': 1}],
    [{'name': 'x', 'value': 'y'}], [{'name': 'x', 'value': 1, 'bar': 'y'}]])
def test_read_bench_refuses(tmp_path, content):
    write(tmp_path / 'c.json', content)
    with pytest.raises(exception.Invalid, match='c.json'):
        report.read_bench(tmp_path)


def test_trace_show_writes_the_reads(target, add, tmp_path, capsys):
    add('a', [1, 2, 0, 3], [[3, 0], [2]])
    path = tmp_path / 'reads.csv'
    assert main.main([
        '--repository', str(tmp_path / 'repository'), 'trace', 'show', 'a',
        '--output', str(path), '-f', 'json']) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown['reads'], shown['bytes']) == (3, 3 * BLOCK)
    assert path.read_text().splitlines() == [
        'time_us,offset,length,boot', f'0,{3 * BLOCK},{BLOCK},0',
        f'1000,0,{BLOCK},0', f'0,{2 * BLOCK},{BLOCK},1']
    assert path.stat().st_mode & 0o777 == 0o640
