# SPDX-License-Identifier: Apache-2.0
"""What a run of Tempest came to."""

import csv
import dataclasses
import io
from typing import Self


@dataclasses.dataclass(frozen=True)
class Run:
    """Tests and how they ended.

    :ivar outcomes: by test, ``success``, ``skip``, or a word for a failure.
    :ivar seconds: that it took.
    :ivar hits: servers on local blocks meanwhile.
    """

    outcomes: dict[str, str]
    seconds: float
    hits: int = 0

    @classmethod
    def read(cls, text: str, seconds: float, hits: int = 0) -> Self:
        """From what ``subunit2csv`` writes."""
        return cls({row['test']: row['status']
                    for row in csv.DictReader(io.StringIO(text))
                    if row['test'].startswith(('tempest.', 'setUpClass',
                                               'tearDownClass'))},
                   seconds, hits)

    def count(self, outcome: str) -> int:
        """Tests that ended so."""
        return list(self.outcomes.values()).count(outcome)

    @property
    def failed(self) -> list[str]:
        """Tests that neither passed nor were skipped."""
        return sorted(test for test, outcome in self.outcomes.items()
                      if outcome not in {'success', 'skip'})

    def worse(self, stock: 'Run') -> list[str]:
        """Tests that pass in the other run, and do not in this one."""
        return sorted(test for test, outcome in stock.outcomes.items()
                      if outcome == 'success'
                      and self.outcomes.get(test) != 'success')

    def summary(self) -> dict[str, int]:
        """Figures for a table."""
        return {'passed': self.count('success'), 'failed': len(self.failed),
                'skipped': self.count('skip'), 'seconds': round(self.seconds),
                'servers on local blocks': self.hits}
