# SPDX-License-Identifier: Apache-2.0
"""How values look in a terminal; ``-f json`` gets them as they are."""

from typing import Any, Final

import prettytable
from cliff import columns

_UNITS: Final = ('B', 'KiB', 'MiB', 'GiB', 'TiB')


class Size(columns.FormattableColumn[Any]):
    """Bytes."""

    def human_readable(self) -> str:
        """In the unit that fits."""
        if self._value is None:
            return ''
        value, unit = float(self._value), 0
        while value >= 1024 and unit < len(_UNITS) - 1:
            value, unit = value / 1024, unit + 1
        return f'{value:.1f} {_UNITS[unit]}' if unit else f'{value:.0f} B'


class Share(columns.FormattableColumn[Any]):
    """A number from 0 to 1."""

    def human_readable(self) -> str:
        """In percent."""
        return '' if self._value is None else f'{self._value:.0%}'


class Ready(columns.FormattableColumn[Any]):
    """How many are in which state."""

    def human_readable(self) -> str:
        """How many of all are ready, and which are in trouble."""
        counts = dict(self._value)
        words = f'{counts.get("ready", 0)}/{sum(counts.values())}'
        trouble = [f'{counts[state]} {state}' for state in
                   ('transferring', 'stale', 'error') if counts.get(state)]
        return f'{words} ({", ".join(trouble)})' if trouble else words


class Lines(columns.FormattableColumn[Any]):
    """Some ids."""

    def human_readable(self) -> str:
        """One a line."""
        return 'unknown' if self._value is None else '\n'.join(self._value)


class Count(columns.FormattableColumn[Any]):
    """Some ids, where there is little room."""

    def human_readable(self) -> str:
        """How many."""
        return '' if self._value is None else str(len(self._value))


class Places(columns.FormattableColumn[Any]):
    """State by host, or by image."""

    def human_readable(self) -> str:
        """A small table."""
        table = prettytable.PrettyTable(
            ['', 'State', 'Progress', 'Reason'], border=False,
            header=False, align='l')
        table.left_padding_width = 0
        for key, row in self._value.items():
            name = f'{row["name"]} ({key})' if row.get('name') else key
            table.add_row([name, described(row), percent(row), row['error']])
        return '\n'.join(
            line.rstrip() for line in table.get_string().splitlines())


class Microvms(columns.FormattableColumn[Any]):
    """The µVMs of an image, or of a host."""

    def human_readable(self) -> str:
        """A line each: what it is, how it is, and why."""
        return '\n'.join(map(_microvm, self._value or ()))


def _microvm(row: dict[str, Any]) -> str:
    words = [row['class'][:12] or row.get('platform', ''), row['state']]
    if row.get('image'):
        words.insert(0, f'{row["name"]} ({row["image"]})'
                     if row.get('name') else row['image'])
    if row['state'] == 'baking':
        words.append(row['stage'].removeprefix('baking: '))
    if row['bytes']:
        words.append(Size(row['bytes']).human_readable())
    if row.get('seconds'):
        words.append(f'baked in {row["seconds"]:.0f} s')
    if row.get('hosts'):
        words.append('hosts: ' + ', '.join(
            f'{count} {state}' for state, count in row['hosts'].items()))
    words += [f'{row[key]} {key}' for key in
              ('lanes', 'resumed', 'fallbacks') if row.get(key)]
    if row['class'] and row.get('platform'):
        words.append(row['platform'])
    line = '  '.join(words)
    return f'{line}: {row["reason"]}' if row['reason'] else line


def described(row: dict[str, Any]) -> str:
    """State of an image on a host, and what kind of ready it is."""
    state, detail = row['state'], row.get('detail', '')
    return f'{state} ({detail})' if state == 'ready' != detail else str(state)


def percent(row: dict[str, Any]) -> str:
    """Progress, where there is some to speak of."""
    if row['state'] == 'transferring':
        return f'{row["progress"]:.0%}'
    # APIs of before do not say it.
    return f'{row["present"]:.0%}' if row.get('present', 1) < 1 and row.get(
        'detail') == 'thawed' else ''
