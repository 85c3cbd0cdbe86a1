# SPDX-License-Identifier: Apache-2.0
"""A store behind any HTTP server that serves files; reading only.

Objects are immutable, so a transfer that breaks is continued with a Range
request, and no entity tags are needed. A server is trusted for nothing but
its patience: what it sends is bounded by what was asked for, and callers check
digests.

The only module that imports requests.
"""

import contextlib
import dataclasses
import http.client
import http.cookiejar
import logging
import os
import pathlib
import random
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import requests
import requests.adapters
import urllib3.exceptions

from fastboot_common import exception
from fastboot_common.store import (
    Check,
    Progress,
    proven,
    validate_name,
    validate_range,
)
from fastboot_common.store.download import download
from fastboot_common.store.throttle import Throttle

LOG: Final = logging.getLogger(__name__)

_PIECE: Final = 256 << 10
_REDIRECTS: Final = 5
#: A connection that brought this many bytes before it broke did no harm: its
#: end is not counted as a failure.
_PROGRESS: Final = 64 << 10
#: Bytes per second below which a body counts as stalled.
_SLOWEST: Final = 1 << 10
#: Longest wait between two tries, in seconds, whatever the server asks for.
_LONGEST_WAIT: Final = 10.0
_CONNECTIONS: Final = 16
#: Bytes of an error's page that are read rather than its connection closed.
_SHORT: Final = 16 << 10

_PASSING: Final = (408, 429, 500, 502, 503, 504)
_GONE: Final = (404, 410)
_CONTENT_RANGE: Final = re.compile(
    r'bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)')
_NUMBER: Final = re.compile(r'[0-9]{1,18}')

#: What a network can answer with, as the libraries have it.
_NETWORK: Final = (
    OSError, urllib3.exceptions.HTTPError, http.client.HTTPException)
_LIBRARY: Final = (
    requests.RequestException, urllib3.exceptions.HTTPError)

#: Headers that a session may have, unset for other servers.
_NO_SECRETS: Final[dict[str, str | None]] = {
    'Authorization': None, 'Cookie': None}

T = TypeVar('T')


class _HiccupError(Exception):
    """A failure that may be over at the next try.

    :param wait: seconds that the server asks us to wait, if it does.
    """

    def __init__(self, words: str, wait: float | None = None) -> None:
        super().__init__(words)
        self.wait = wait


@dataclasses.dataclass
class _Patience:
    """How many failures in a row one call still bears."""

    what: str
    retries: int
    backoff: float
    failures: int = 0
    gained: int = 0

    def gain(self, count: int) -> None:
        """`count` bytes came through."""
        self.gained += count
        if self.gained >= _PROGRESS:
            self.failures = 0

    def lose(self, hiccup: _HiccupError) -> None:
        """Wait before the next try.

        :raises Unavailable: there is to be none.
        """
        self.gained = 0
        self.failures += 1
        if self.failures > self.retries:
            raise exception.Unavailable(
                f'{self.what}: {hiccup}; gave up after {self.failures} '
                f'failures in a row') from hiccup.__cause__
        wait = hiccup.wait
        if wait is None:
            # Not all hosts at once, when a server comes back.
            wait = self.backoff * 2 ** self.failures * random.uniform(.5, 1)
        LOG.info('%s: %s; trying again', self.what, hiccup)
        time.sleep(min(wait, _LONGEST_WAIT))


@dataclasses.dataclass(frozen=True)
class _Span:
    """What part of an object a body is (bytes; None: not said)."""

    start: int
    total: int | None


class HttpStore:
    """A :class:`~fastboot_common.store.ReadStore` over HTTP or HTTPS.

    Proxies are taken from the environment. A user and password in the URL are
    sent to its own server only, and written nowhere.

    :param url: what object names are appended to.
    :param timeout: seconds without a byte after which a connection counts as
        broken; also bounds each connecting.
    :param retries: how many failures in a row are borne.
    :param backoff: seconds to wait after the first failure; doubles with each
        further one.
    :param session: use this one instead of an own one.
    :param throttle: what all threads take together; others may share it.
    :param ca_file: certificates to trust instead of the system's.
    :raises ConfigError: one of these cannot work.
    """

    def __init__(self, url: str, *, timeout: float = 10.0, retries: int = 4,
                 backoff: float = 0.2,
                 session: requests.Session | None = None,
                 throttle: Throttle | None = None,
                 ca_file: str | None = None) -> None:
        self._url, self._auth = _parsed(url)
        if ca_file is not None and not os.path.isfile(ca_file):
            raise exception.ConfigError(f'no file of certificates: {ca_file}')
        if timeout <= 0 or retries < 0:
            raise exception.ConfigError(
                f'a timeout of {timeout} s with {retries} retries lets '
                f'nothing through')
        self._verify = ca_file or True
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._session = session or _new_session()
        self._throttle = throttle

    def __repr__(self) -> str:
        return f'HttpStore({self._url!r})'

    def get(self, name: str, limit: int = 64 << 20,
            check: Check | None = None) -> bytes:
        # Begun anew when it breaks, not continued: head.json may change in
        # between.
        return proven(self._patiently(
            name, lambda: self._get(name, limit)), check)

    def read(self, name: str, offset: int, length: int,
             check: Check | None = None) -> bytes:
        validate_range(offset, length)
        if not length:
            self.size(name)  # HTTP has no range of no bytes
            return proven(b'', check)
        return proven(b''.join(
            self._pieces(name, offset, offset + length)), check)

    def size(self, name: str) -> int:
        return self._patiently(name, lambda: self._size(name))

    def fetch(self, name: str, path: pathlib.Path, digest: str, size: int,
              progress: Progress | None = None) -> None:
        download(self._what(validate_name(name)), path, digest, size,
                 lambda offset: self._pieces(name, offset), progress)

    def _get(self, name: str, limit: int) -> bytes:
        with self._ask('GET', name) as response:
            total = self._span(name, response).total
            data = b''
            if total is None or total <= limit:
                data = b''.join(self._body(response, limit + 1))
            if (total or len(data)) > limit:
                raise exception.Corrupt(
                    f'{self._what(name)} has more than the {limit} bytes '
                    f'that are allowed')
            if len(data) < (total or 0):
                raise _HiccupError(f'only {len(data)} of {total} bytes came')
            return data

    def _size(self, name: str) -> int:
        with self._ask('HEAD', name) as response:
            total = self._span(name, response).total
        if total is None:
            raise self._nonsense(name, 'does not say how long it is')
        return total

    def _pieces(self, name: str, start: int,
                end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to before `end` (None: the object's end).

        Over as many connections as it takes.
        """
        patience = self._patience(name)
        while end is None or start < end:
            try:
                with self._ask('GET', name, start, end) as response:
                    if response.status_code == 416:
                        self._check_end(name, start, end)
                        return
                    span = self._span(name, response, start, end)
                    end = self._end(name, span, end)
                    skip = start - span.start
                    for data in self._body(response, end - span.start):
                        useful = data[skip:]
                        skip -= len(data) - len(useful)
                        start += len(useful)
                        patience.gain(len(useful))
                        if useful:
                            yield useful
                if start < end:
                    raise _HiccupError(
                        f'the answer ended at {start}, before {end}')
            except _HiccupError as hiccup:
                patience.lose(hiccup)

    def _end(self, name: str, span: _Span, end: int | None) -> int:
        """Where to stop: `end`, or the object's own end if that is None."""
        if span.total is not None:
            self._check_end(name, span.total, end)
            return span.total if end is None else end
        if end is None:
            # Or a server that never stops would fill the disk.
            raise self._nonsense(name, 'does not say how long it is')
        return end

    def _check_end(self, name: str, total: int, end: int | None) -> None:
        if end is not None and total < end:
            raise exception.Corrupt(
                f'{self._what(name)} ends at {total} or before, not at or '
                f'after {end}')

    def _span(self, name: str, response: requests.Response,
              start: int = 0, end: int | None = None) -> _Span:
        """What the body of `response` is, by its headers.

        :param start: first byte that was asked for.
        :param end: behind the last byte that was asked for, if it was said.
        """
        headers = response.headers
        if headers.get('Content-Encoding', 'identity') != 'identity':
            raise self._nonsense(name, 'encodes what it was asked not to')
        length = headers.get('Content-Length')
        if length is not None and not _NUMBER.fullmatch(length):
            raise self._nonsense(name, f'gives the length {length[:99]!r}')
        size = None if length is None else int(length)
        if response.status_code == 200:  # also of one that knows no ranges
            return _Span(0, size)
        words = headers.get('Content-Range', '')
        match = _CONTENT_RANGE.fullmatch(words)
        if response.status_code == 206 and match:
            first, last = int(match[1]), int(match[2])
            total = None if match[3] == '*' else int(match[3])
            if (start == first <= last and (end is None or last < end)
                    and (total is None or last < total)
                    and size in (None, last + 1 - first)):
                return _Span(first, total)
        raise self._nonsense(
            name, f'answers {response.status_code}, length {size} and range '
                  f'{words[:99]!r} when asked for {start} to {end}')

    def _body(self, response: requests.Response,
              count: int) -> Iterator[bytes]:
        """The body as it arrives, but at most `count` bytes."""
        came, spent = 0, 0.0
        while came < count:
            before = time.monotonic()
            wanted = min(count - came, _PIECE)
            # A chunk of negative length gives all that came.
            data = response.raw.read1(wanted, decode_content=False)[:wanted]
            spent += time.monotonic() - before
            if not data:
                return
            came += len(data)
            if self._throttle is not None:
                self._throttle.take(len(data))
            yield data
            if spent > self._timeout and came < spent * _SLOWEST:
                raise _HiccupError(f'{came} bytes in {spent:.0f} s: stalled')

    # One request

    @contextlib.contextmanager
    def _ask(self, method: str, name: str, start: int = 0,
             end: int | None = None) -> Iterator[requests.Response]:
        """An answer that is worth reading: 200, 206 or 416.

        :raises NotFound: there is no such object.
        :raises Unavailable: the server refuses.
        """
        headers: dict[str, str | None] = {'Accept-Encoding': 'identity'}
        if start or end is not None:
            last = '' if end is None else end - 1
            headers['Range'] = f'bytes={start}-{last}'
        try:
            with contextlib.closing(
                    self._follow(method, validate_name(name), headers)
            ) as response:
                if method == 'HEAD' or response.status_code not in (200, 206):
                    self._drain(response)
                self._check_status(name, response)
                yield response
        except _NETWORK as error:
            cause = _innermost(error)
            if isinstance(cause, _LIBRARY):
                # Its text may have a URL, and that a secret.
                raise _HiccupError(type(cause).__name__) from None
            raise _HiccupError(f'{type(cause).__name__}: {cause}') from cause

    def _follow(self, method: str, name: str,
                headers: dict[str, str | None]) -> requests.Response:
        """Ask, and ask on where the server sends us.

        Past the session's own sending, which reads the body of a redirect
        to its end, even if told not to follow it.
        """
        url = f'{self._url}/{name}'
        for _ in range(_REDIRECTS + 1):
            response = self._send(method, url, headers)
            target = self._redirect(name, response)
            if target is None:
                return response
            url = target
        raise self._nonsense(name, f'redirects more than {_REDIRECTS} times')

    def _send(self, method: str, url: str,
              headers: dict[str, str | None]) -> requests.Response:
        own = _origin(url) == _origin(self._url)
        request = self._session.prepare_request(requests.Request(
            method, url, headers if own else headers | _NO_SECRETS,
            auth=self._auth if own else _no_auth))
        settings = self._session.merge_environment_settings(
            request.url, {}, True, self._verify, None)
        return self._session.get_adapter(url).send(
            request, stream=True, timeout=self._timeout,
            verify=settings['verify'] or True, cert=settings['cert'],
            proxies=settings['proxies'])

    def _redirect(self, name: str, response: requests.Response) -> str | None:
        """Where `response` sends us; it is closed then."""
        if not response.is_redirect:
            return None
        response.close()
        target = response.headers['Location']
        try:
            url = urllib.parse.urljoin(response.url, target)
            old, new = _origin(response.url)[0], _origin(url)[0]
        except ValueError as error:
            raise self._nonsense(name, 'redirects to no URL') from error
        if new not in ('https', old):
            raise self._nonsense(name, f'redirects from {old} to {new[:9]!r}')
        return url

    def _drain(self, response: requests.Response) -> None:
        """Read a short body, so that the connection can be used again."""
        with contextlib.suppress(_HiccupError, *_NETWORK):
            for _data in self._body(response, _SHORT):
                pass

    def _check_status(self, name: str, response: requests.Response) -> None:
        status = int(response.status_code)
        if status in (200, 206, 416):
            return
        if status in _GONE:
            raise exception.NotFound(f'{self._what(name)} is not there')
        if status in _PASSING:
            wait = response.headers.get('Retry-After', '')
            raise _HiccupError(
                f'the server answered {status}',
                float(wait) if _NUMBER.fullmatch(wait) else None)
        raise exception.Unavailable(
            f'{self._what(name)}: the server answered {status}')

    # What all of them need

    def _patiently(self, name: str, attempt: Callable[[], T]) -> T:
        patience = self._patience(name)
        while True:
            try:
                return attempt()
            except _HiccupError as hiccup:
                patience.lose(hiccup)

    def _patience(self, name: str) -> _Patience:
        return _Patience(self._what(name), self._retries, self._backoff)

    def _nonsense(self, name: str, words: str) -> exception.Unavailable:
        return exception.Unavailable(f'{self._what(name)}: the server {words}')

    def _what(self, name: str) -> str:
        return f'{self._url}/{name}'


def _parsed(url: str) -> tuple[str, tuple[str, str] | None]:
    """The URL without its credentials, and these."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname if parts.port != 0 else None
    except ValueError as error:
        raise exception.ConfigError(
            f'the URL of the store is not one: {error}') from error
    shown = urllib.parse.urlunsplit((
        parts.scheme, parts.netloc.rpartition('@')[2],
        parts.path.rstrip('/'), '', ''))
    if parts.scheme not in ('http', 'https') or not host:
        raise exception.ConfigError(f'not an HTTP URL of a store: {shown!r}')
    if parts.query or parts.fragment:
        raise exception.ConfigError(
            f'the URL of a store has no query and no fragment: {shown!r}')
    if parts.username is None:
        return shown, None
    return shown, (urllib.parse.unquote(parts.username),
                   urllib.parse.unquote(parts.password or ''))


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _no_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Keeps requests from adding credentials of its own finding."""
    return request


def _new_session() -> requests.Session:
    """One for all threads: a pool, and nothing that requests change."""
    session = requests.Session()
    session.headers['User-Agent'] = 'fastboot'
    session.cookies.set_policy(
        http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
    session.mount('http://', adapter)
    session.mount('https://', adapter)
    return session


def _innermost(error: BaseException) -> BaseException:
    """What the libraries wrapped, if they tell."""
    while isinstance(error, _LIBRARY):
        inner = error.__cause__ or error.__context__
        if not isinstance(inner, _NETWORK):
            break
        error = inner
    return error
