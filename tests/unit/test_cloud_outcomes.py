# SPDX-License-Identifier: Apache-2.0
"""tools/cloud: what a run of Tempest came to."""

import pathlib
import sys

TOOLS = pathlib.Path(__file__).parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))

from cloud.outcomes import Run  # noqa: E402

TABLE = '''\
test,status,start_time,stop_time
tempest.a,success,2026-01-01 00:00:00,2026-01-01 00:00:01
"tempest.b[id-1,negative]",failure,2026-01-01 00:00:00,2026-01-01 00:00:01
tempest.c,error,2026-01-01 00:00:00,2026-01-01 00:00:01
tempest.d,skip,2026-01-01 00:00:00,2026-01-01 00:00:01
tempest.e,uxsuccess,2026-01-01 00:00:00,2026-01-01 00:00:01
setUpClass (tempest.f),failure,2026-01-01 00:00:00,2026-01-01 00:00:01
process-returncode,failure,2026-01-01 00:00:00,2026-01-01 00:00:01
'''


def test_what_neither_passed_nor_was_skipped_has_failed():
    run = Run.read(TABLE, 2.4, hits=1)
    assert run.failed == ['setUpClass (tempest.f)',
                          'tempest.b[id-1,negative]', 'tempest.c',
                          'tempest.e']
    assert run.summary() == {'passed': 1, 'failed': 4, 'skipped': 1,
                             'seconds': 2, 'servers on local blocks': 1}


def test_ours_is_worse_where_only_the_other_passes():
    stock = Run({'a': 'success', 'b': 'success', 'c': 'failure'}, 1.0)
    ours = Run({'a': 'failure', 'c': 'failure', 'd': 'failure'}, 1.0)
    assert ours.worse(stock) == ['a', 'b']
    assert stock.worse(ours) == []
