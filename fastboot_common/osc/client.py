# SPDX-License-Identifier: Apache-2.0
"""The HTTP API, as the commands see it."""

import urllib.parse
from typing import Any, Final

from keystoneauth1 import adapter
from keystoneauth1 import exceptions as ksa_exceptions
from osc_lib import exceptions

SERVICE_TYPE: Final = 'fastboot'


class Client:
    """Calls of the API.

    Every method raises what keystoneauth raises: its ``HttpError`` carries
    the words of the API.

    :param session: a keystoneauth session.
    """

    def __init__(self, session: Any, region_name: str | None = None,
                 interface: str | None = None) -> None:
        self._adapter = adapter.Adapter(
            session, service_type=SERVICE_TYPE, region_name=region_name,
            interface=interface)

    def images(self, **filters: str | None) -> list[dict[str, Any]]:
        """All images, page after page."""
        return self._list('images', filters)

    def image(self, image_id: str) -> dict[str, Any]:
        """An image."""
        return self._get(f'/v1/images/{_quote(image_id)}', 'image')

    def find_image(self, reference: str) -> dict[str, Any]:
        """An image by id, or by a name that only one has.

        :raises CommandError: there is none, or several have the name.
        """
        try:
            return self.image(reference)
        except (ksa_exceptions.NotFound, ksa_exceptions.BadRequest):
            found = self.images(name=reference, hosts='false')
        if len(found) > 1:
            raise exceptions.CommandError(
                f'{len(found)} images have the name {reference}; use an id')
        if not found:
            raise exceptions.CommandError(
                f'fastboot knows no image {reference}')
        return self.image(found[0]['id'])

    def act(self, image_id: str, action: str) -> dict[str, Any]:
        """Build or refresh an image.

        :param action: ``build`` or ``refresh``.
        """
        answer = self._adapter.post(
            f'/v1/images/{_quote(image_id)}/action', json={action: {}})
        return dict(answer.json()['image'])

    def hosts(self, **filters: str | None) -> list[dict[str, Any]]:
        """All hosts, page after page."""
        return self._list('hosts', filters)

    def host(self, name: str) -> dict[str, Any]:
        """A host."""
        return self._get(f'/v1/hosts/{_quote(name)}', 'host')

    def sync(self, name: str, images: list[str] | None) -> None:
        """Tell a host to fetch what it lacks.

        :param images: ids; None: all.
        """
        self._adapter.post(
            f'/v1/hosts/{_quote(name)}/sync',
            json={'images': images} if images else {})

    def _get(self, path: str, member: str) -> dict[str, Any]:
        return dict(self._adapter.get(path).json()[member])

    def _list(self, name: str,
              filters: dict[str, str | None]) -> list[dict[str, Any]]:
        """All rows; a page's link says how the next one is asked for."""
        query = urllib.parse.urlencode({
            key: value for key, value in filters.items()
            if value is not None})
        rows: list[dict[str, Any]] = []
        while True:
            page = self._adapter.get(f'/v1/{name}?{query}').json()
            rows += page[name]
            links = page.get(f'{name}_links')
            if not links:
                return rows
            # Of the link only the query: the API may see itself under
            # another address than we do.
            query = urllib.parse.urlsplit(links[0]['href']).query


def _quote(word: str) -> str:
    return urllib.parse.quote(word, safe='')
