# SPDX-License-Identifier: Apache-2.0
"""Short programs on a node."""

import subprocess
from collections.abc import Sequence

from cloud.layout import CONTROL, Layout
from cloud.network import enter
from cloud.process import Records
from cloud.services import environment
from cloud.steps import StepError

_SECONDS = 600
_LINES = 20


class Inside:
    """Runs programs in the namespaces of nodes."""

    def __init__(self, layout: Layout, records: Records) -> None:
        self._layout = layout
        self._records = records

    def run(self, *words: str, node: str = CONTROL,
             feed: str = '', accept: Sequence[int] = (0,)) -> str:
        """Run a program on a node.

        :raises StepError: it fails; the message has its last lines.
        """
        done = subprocess.run(
            [*enter(self._records, node), *words],
            env=environment(self._layout), input=feed,
            capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode not in accept:
            last = (done.stdout + done.stderr).strip().splitlines()[-_LINES:]
            raise StepError('\n'.join(
                [f'{words[0]} failed:', *last]))
        return str(done.stdout)
