# SPDX-License-Identifier: Apache-2.0
"""One request: its caller, its words, and what it may do."""

import functools
import json
import time
import urllib.parse
from typing import Any, Final

from oslo_policy import policy

from fastboot_common import exception
from fastboot_glance.api import overview, parts

#: Bytes of a request's body.
BODY_LIMIT: Final = 64 << 10


class Conflict(exception.FastbootError):
    """What is there does not allow it now. Nothing was done."""


class NotAllowed(exception.FastbootError):
    """The path knows other methods only.

    :param allowed: those.
    """

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = ', '.join(allowed)
        super().__init__(f'only {self.allowed} is possible here')


class Call:
    """A request that was authenticated.

    :param request: a :class:`webob.Request`.
    :param context: the caller, an oslo.context's ``RequestContext``.
    """

    def __init__(self, request: Any, context: Any, enforcer: policy.Enforcer,
                 found: parts.Parts) -> None:
        self.request = request
        self.parts = found
        self._context = context
        self._enforcer = enforcer
        self._allowed: dict[tuple[str, str | None], bool] = {}

    @functools.cached_property
    def clock(self) -> overview.Clock:
        """The moment of the call."""
        return overview.Clock(time.time(), self.parts.conf.api.stale_after)

    def authorize(self, rule: str, owner: str | None = None) -> None:
        """Go on only if the caller may.

        :param rule: without its ``fastboot:``.
        :param owner: project of the image that it is about.
        :raises PolicyNotAuthorized: the caller may not.
        """
        self._enforcer.authorize(
            f'fastboot:{rule}', self._target(owner), self._context,
            do_raise=True)

    def may(self, rule: str, owner: str | None = None) -> bool:
        """Whether the caller may."""
        key = rule, owner
        if key not in self._allowed:  # owners are few, images many
            self._allowed[key] = bool(self._enforcer.authorize(
                f'fastboot:{rule}', self._target(owner), self._context))
        return self._allowed[key]

    def _target(self, owner: str | None) -> dict[str, str | None]:
        # Without an image, a rule about owners asks about the caller.
        return {'project_id': self._context.project_id
                if owner is None else owner}

    def words(self, *allowed: str) -> dict[str, str]:
        """The query's parameters.

        :raises Invalid: there is another than `allowed`, or one twice.
        """
        try:
            found = self.request.GET.mixed()
        except UnicodeDecodeError as error:
            raise exception.Invalid('the query is not UTF-8') from error
        for key, value in found.items():
            if key not in allowed:
                raise exception.Invalid(
                    f'unknown parameter {key[:80]!r}; known are '
                    f'{", ".join(allowed)}')
            if not isinstance(value, str):
                raise exception.Invalid(f'{key} is given twice')
        return dict(found)

    def limit(self, word: str | None) -> int:
        """How many rows to give.

        :raises Invalid: `word` is no number of rows.
        """
        most = int(self.parts.conf.api.max_limit)
        if word is None:
            return most
        if not (word.isascii() and word.isdigit() and len(word) < 10):
            raise exception.Invalid(f'limit is no number: {word[:80]!r}')
        return min(int(word), most)

    def body(self) -> dict[str, Any]:
        """The JSON object in the body; an empty body is an empty one.

        :raises Invalid: it is something else, or too long.
        """
        data = self.request.body_file.read(BODY_LIMIT + 1)
        if len(data) > BODY_LIMIT:
            raise exception.Invalid(
                f'the body has more than {BODY_LIMIT} bytes')
        try:
            found = json.loads(data or b'{}')
        except (ValueError, RecursionError) as error:
            raise exception.Invalid(f'not JSON: {error}') from error
        if not isinstance(found, dict):
            raise exception.Invalid('the body is no JSON object')
        return found

    def page(self, name: str, rows: list[Any], key: str,
             words: dict[str, str]) -> tuple[list[Any], dict[str, Any]]:
        """The rows that were asked for, and the link to the next ones.

        :param name: of the collection.
        :param rows: all, sorted by `key`.
        """
        marker = words.get('marker', '')
        rest = [row for row in rows if row[key] > marker]
        limit = self.limit(words.get('limit'))
        if len(rest) <= limit or limit == 0:
            return rest[:limit], {}
        query = urllib.parse.urlencode(
            {**words, 'marker': rest[limit - 1][key]})
        return rest[:limit], {f'{name}_links': [
            {'rel': 'next', 'href': f'{self.request.path_url}?{query}'}]}
