# SPDX-License-Identifier: Apache-2.0
"""Glance's images as the builders use them: look, list, download, tell.

Through the Image API with a service user that may see and change every
image. It imports nothing of Glance.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

import requests
import urllib3
from keystoneauth1 import exceptions as ks_exception
from keystoneauth1 import loading
from oslo_log import log as logging
from oslo_serialization import jsonutils

from fastboot_common import exception, files
from fastboot_common.store import throttle

LOG = logging.getLogger(__name__)

#: Bytes that a download leaves free on the file system.
RESERVE: Final = 1 << 30
_CHUNK: Final = 256 << 10
_PAGE: Final = 500
_LONGEST_WAIT: Final = 30.0
_TRIES: Final = 4
#: The longest value that every Glance takes.
_VALUE: Final = 255
_RANGE: Final = re.compile(r'bytes (\d+)-\d+/(\d+|\*)')
_PATCH: Final = 'application/openstack-images-v2.1-json-patch'
_GONE: Final = ('deleted', 'pending_delete')
_BROKEN: Final = (
    requests.RequestException, urllib3.exceptions.HTTPError,
    ks_exception.ClientException, exception.Unavailable)


@dataclasses.dataclass(frozen=True)
class Image:
    """An image as Glance shows it (sizes in bytes).

    :ivar properties: what is no attribute of all images, text only.
    """

    image_id: str
    name: str
    status: str
    size: int | None
    virtual_size: int | None
    disk_format: str
    container_format: str
    owner: str
    visibility: str
    hash_algorithm: str
    hash_value: str
    properties: dict[str, str]

    @classmethod
    def parse(cls, found: dict[str, Any]) -> 'Image':
        """From the API's JSON object."""
        return cls(
            image_id=str(found['id']), name=found.get('name') or '',
            status=str(found['status']), size=found.get('size'),
            virtual_size=found.get('virtual_size'),
            disk_format=found.get('disk_format') or '',
            container_format=found.get('container_format') or '',
            owner=found.get('owner') or '',
            visibility=found.get('visibility') or 'private',
            hash_algorithm=found.get('os_hash_algo') or '',
            hash_value=found.get('os_hash_value') or '',
            properties={key: value for key, value in found.items()
                        if isinstance(value, str) and key not in _BASE})

    @property
    def wish(self) -> str | None:
        """What its owner wants of us: the property ``fastboot``."""
        return self.properties.get('fastboot')


_BASE: Final = frozenset((
    'id', 'name', 'status', 'disk_format', 'container_format', 'owner',
    'visibility', 'os_hash_algo', 'os_hash_value', 'checksum', 'created_at',
    'updated_at', 'self', 'file', 'schema', 'direct_url', 'stores'))


class Images:
    """The images of the Glance that ``[glance]`` names. Threads share it."""

    def __init__(self, conf: Any) -> None:
        """Connect when used.

        :raises ConfigError: the group lacks something.
        """
        group = conf.glance
        self._retries: int = group.retries
        self._limit_rate: int = group.limit_rate
        try:
            auth = loading.load_auth_from_conf_options(conf, 'glance')
            session = loading.load_session_from_conf_options(
                conf, 'glance', auth=auth)
            self._adapter = loading.load_adapter_from_conf_options(
                conf, 'glance', session=session)
        except (ks_exception.ClientException, ValueError) as error:
            raise exception.ConfigError(f'[glance]: {error}') from error

    def get(self, image_id: str) -> Image:
        """The image as it is now.

        :raises NotFound: there is none, or it is being deleted.
        :raises Unavailable: Glance cannot be asked.
        """
        name = urllib.parse.quote(image_id, safe='')
        found = Image.parse(self._json(
            f'/v2/images/{name}', f'image {image_id}'))
        if found.status in _GONE:
            raise exception.NotFound(f'image {image_id} is {found.status}')
        return found

    def list(self) -> Iterator[Image]:
        """All images, hidden ones too; each page as it comes.

        An image that is made or deleted meanwhile may be missing: ask for
        it before you believe that it is gone.

        :raises Unavailable: Glance cannot be asked; the list is incomplete.
        """
        for hidden in ('false', 'true'):
            # Oldest first, so that images made meanwhile are at the end.
            path = (f'/v2/images?limit={_PAGE}&os_hidden={hidden}'
                    f'&sort=created_at:asc')
            while path:
                page = self._json(path, 'the list of images')
                for found in page['images']:
                    yield Image.parse(found)
                path = page.get('next', '')

    def fetch(self, image: Image, path: pathlib.Path,
              cancel: threading.Event,
              progress: Callable[[int], None]) -> None:
        """Download an image; what is there of an earlier try is kept.

        :param path: gets the whole image, proven by its hash; until then
            the data are in a file beside it.
        :param cancel: when set, the download is given up.
        :param progress: told the bytes that are there.
        :raises NotFound: the image was deleted.
        :raises Corrupt: the bytes have another hash; they were dropped.
        :raises NoSpace: there is no room.
        :raises Busy: cancelled.
        :raises Unavailable: Glance gives no data.
        """
        part = path.with_name(path.name + '.part')
        failures = 0
        if _size(part):
            LOG.info('image %s: an earlier download goes on at byte %d',
                     image.image_id, _size(part))
        while True:
            have = _size(part)
            try:
                self._continue(image, part, cancel, progress)
                break
            except _BROKEN as error:
                failures = 0 if _size(part) > have else failures + 1
                if failures > self._retries:
                    raise exception.Unavailable(
                        f'image {image.image_id}: {error}') from error
                LOG.info('image %s: %s; going on at byte %d',
                         image.image_id, error, _size(part))
            if cancel.wait(min(2.0 ** failures / 2, _LONGEST_WAIT)):
                raise exception.Busy(f'image {image.image_id}: cancelled')
        _prove(image, part)
        with part.open('rb') as file:
            files.sync(file.fileno())
        part.rename(path)
        files.sync_directory(path.parent)

    def _continue(self, image: Image, part: pathlib.Path,
                  cancel: threading.Event,
                  progress: Callable[[int], None]) -> None:
        """One request: from where the file ends to the image's end."""
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640),
                  'r+b') as file:
            start = file.seek(0, os.SEEK_END)
            if image.size is not None:
                if start > image.size:
                    start = file.truncate(0)
                if start == image.size:
                    return
                _check_room(part.parent, image.size - start)
            with self._data(image, start) as response:
                if start and response.status_code != 206:
                    # A store without random access: all of it once more.
                    start = 0
                file.truncate(start)
                file.seek(start)
                rate = throttle.Throttle(self._limit_rate) \
                    if self._limit_rate else None
                for chunk in response.iter_content(_CHUNK):
                    if cancel.is_set():
                        raise exception.Busy(
                            f'image {image.image_id}: cancelled')
                    if rate:
                        rate.take(len(chunk))
                    _write(file, chunk)
                    start += len(chunk)
                    if image.size is not None and start > image.size:
                        break
                    progress(start)
        if image.size is not None and start != image.size:
            if start > image.size:
                part.unlink()
            raise exception.Unavailable(
                f'Glance sent {start} bytes instead of {image.size}')

    @contextlib.contextmanager
    def _data(self, image: Image, start: int) -> Iterator[requests.Response]:
        """The answer with the image's bytes from `start`, if it has them."""
        what = f'image {image.image_id}'
        path = f'/v2/images/{image.image_id}/file'
        headers = {'Range': f'bytes={start}-'} if start else {}
        response = self._request('GET', path, headers=headers, stream=True)
        if start and response.status_code in (400, 416, 501):
            response.close()
            response = self._request('GET', path, stream=True)
        with response:
            _check(response, what)
            if response.status_code == 204:
                raise exception.Invalid(f'{what} has no data')
            if response.status_code == 206:
                found = _RANGE.fullmatch(
                    response.headers.get('Content-Range', ''))
                if not found or int(found[1]) != start:
                    raise exception.Unavailable(
                        f'{what}: Glance sent another range than asked for')
            yield response

    def tell(self, image_id: str, values: dict[str, str | None]) -> bool:
        """Set properties of an image; None removes one.

        :returns: False if it may not be changed.
        :raises NotFound: there is no such image.
        :raises Unavailable: Glance cannot be asked.
        """
        for _ in range(_TRIES):
            known = self.get(image_id).properties
            wanted = changes(known, values)
            if not wanted:
                return True
            response = self._request(
                'PATCH', f'/v2/images/{image_id}',
                headers={'Content-Type': _PATCH},
                data=jsonutils.dumps(wanted))
            # Somebody else changed the image between our two requests.
            if response.status_code == 409:
                continue
            if response.status_code in (400, 403, 413):
                LOG.warning('image %s: Glance refuses our properties: %s',
                            image_id, _words(response))
                return False
            _check(response, f'image {image_id}')
            return True
        raise exception.Unavailable(
            f'image {image_id} is being changed by others')

    # Requests

    def _json(self, path: str, what: str) -> dict[str, Any]:
        response = self._request('GET', path)
        _check(response, what)
        try:
            found = response.json()
            if isinstance(found, dict):
                return found
        except ValueError:
            pass
        raise exception.Unavailable(f'{what}: Glance sent no JSON object')

    def _request(self, method: str, path: str,
                 **options: Any) -> requests.Response:
        try:
            endpoint = self._adapter.get_endpoint()
            if endpoint is None:
                raise exception.Unavailable(
                    'the catalog has no endpoint for images; check '
                    '[glance] region_name and valid_interfaces')
            # Some catalogs name the version, most do not.
            base = re.sub(r'/v2(\.\d+)?/?$', '', endpoint).rstrip('/')
            # The adapter's own sets no rate, but holds requests up until
            # the time at which it was made: an hour, if the clock was wrong
            # by one and was set back (keystoneauth1 5.18, _fair_semaphore).
            response: requests.Response = self._adapter.request(
                path, method, endpoint_override=base, raise_exc=False,
                rate_semaphore=contextlib.nullcontext(), **options)
            return response
        except (ks_exception.ClientException,
                requests.RequestException) as error:
            raise exception.Unavailable(f'Glance: {error}') from error


def _check(response: requests.Response, what: str) -> None:
    """:raises NotFound: 404.

    :raises Unavailable: any other refusal.
    """
    if response.status_code == 404:
        raise exception.NotFound(f'{what}: not found in Glance')
    if response.status_code >= 400:
        raise exception.Unavailable(
            f'{what}: Glance answered {response.status_code}: '
            f'{_words(response)}')


def _words(response: requests.Response) -> str:
    """What the answer says, without its HTML."""
    text = re.sub(r'<[^>]*>|\s+', ' ', response.text[:2000])
    return re.sub(' +', ' ', text).strip()[:300]


def changes(known: dict[str, str],
            values: dict[str, str | None]) -> list[dict[str, str]]:
    """The JSON patch that sets properties; None removes one."""
    patch = []
    for key, value in values.items():
        if value is None:
            if key in known:
                patch.append({'op': 'remove', 'path': f'/{key}'})
            continue
        value = ' '.join(value.split())[:_VALUE]
        if known.get(key) != value:
            patch.append({'op': 'add', 'path': f'/{key}', 'value': value})
    return patch


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _check_room(directory: pathlib.Path, wanted: int) -> None:
    space = os.statvfs(directory)
    free = space.f_bavail * space.f_frsize
    if free < wanted + RESERVE:
        raise exception.NoSpace(
            f'{directory}: {free} bytes are free, {wanted} and a reserve of '
            f'{RESERVE} are needed')


def _write(file: Any, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise exception.NoSpace(f'{file.name}: {error.strerror}') from error


def _prove(image: Image, part: pathlib.Path) -> None:
    """Compare the file with the image's hash.

    :raises Corrupt: they differ; the file is gone.
    """
    if not image.hash_value:
        LOG.warning('image %s: Glance knows no hash of it; its bytes are '
                    'taken as they came', image.image_id)
        return
    try:
        with part.open('rb') as file:
            found = hashlib.file_digest(
                file, image.hash_algorithm).hexdigest()
    except ValueError as error:
        raise exception.Invalid(
            f'image {image.image_id}: no hash {image.hash_algorithm!r} is '
            f'known here') from error
    if not hmac.compare_digest(found, image.hash_value.lower()):
        part.unlink()
        raise exception.Corrupt(
            f'image {image.image_id}: {image.hash_algorithm} of what Glance '
            f'sent is {found:.16}..., it should be {image.hash_value:.16}...')
