# SPDX-License-Identifier: Apache-2.0
"""``/v1/hosts``."""

from typing import Any, Final

from fastboot_common import exception, journal
from fastboot_glance import records, reports
from fastboot_glance.api import overview
from fastboot_glance.api.call import Call, Conflict

_SYNC_LIMIT: Final = 1000


def index(call: Call) -> tuple[int, dict[str, Any]]:
    """List hosts."""
    call.authorize('hosts:list')
    words = call.words('state', 'limit', 'marker')
    state = call.parts.state()
    hosts = {host.name: host for host in call.parts.records.hosts()}
    rows = [
        row for name in sorted(hosts)
        if (row := overview.host_row(hosts[name], state, call.clock))[
            'state'] == words.get('state', row['state'])]
    shown, links = call.page('hosts', rows, 'name', words)
    for row in shown:
        row['image_states'] = overview.count(
            _images(call, state, hosts[row['name']]).values())
    return 200, {'hosts': shown, 'version': state.version, **links}


def show(call: Call, name: str) -> tuple[int, dict[str, Any]]:
    """Show a host and what it has."""
    call.authorize('hosts:show')
    call.words()
    host = _find(call, name)
    state = call.parts.state()
    images = _images(call, state, host)
    return 200, {'host': {
        **overview.host_row(host, state, call.clock),
        'image_states': overview.count(images.values()), 'images': images,
        'microvms': _microvms(call, state, host)}}


def _find(call: Call, name: str) -> records.Host:
    host = call.parts.records.host(reports.validate_host(name))
    if host is None:
        raise exception.NotFound(f'host {name} has never reported')
    return host


def _images(call: Call, state: journal.State,
            host: records.Host) -> dict[str, dict[str, Any]]:
    """The images that are registered, and what else the host has."""
    found = {}
    for image_id in sorted(state.images.keys() | host.images.keys()):
        image = state.images.get(image_id)
        if call.may('images:show', image.owner if image else ''):
            found[image_id] = {
                'name': image.name if image else '',
                **overview.on_host(image, image_id, host, call.clock)}
    return found


def _microvms(call: Call, state: journal.State,
              host: records.Host) -> list[dict[str, Any]] | None:
    """What it has of µVMs; None: it is too old to say."""
    if host.microvms is None:
        return None
    found = []
    for one in sorted(host.microvms, key=lambda one: (
            one.image_id, one.group)):
        image = state.images.get(one.image_id)
        if call.may('images:show', image.owner if image else ''):
            found.append({'name': image.name if image else '',
                          **overview.host_microvm_row(one)})
    return found


def sync(call: Call, name: str) -> tuple[int, dict[str, Any]]:
    """Tell a host to fetch what it lacks."""
    call.authorize('hosts:sync')
    images = _wanted(call.body())
    host = _find(call, name)
    if call.clock.is_stale(host):
        raise Conflict(
            f'host {name}: {call.clock.silence(host)}; its agent does not '
            f'run, or does not reach the message bus')
    registered = call.parts.state().images
    for image_id in images or ():
        if image_id not in registered:
            raise exception.NotFound(f'image {image_id} is not registered')
    call.parts.sync(name, images)
    return 202, {}


def _wanted(body: dict[str, Any]) -> list[str] | None:
    """:raises Invalid: the body is not of a sync."""
    images = body.get('images')
    if body.keys() - {'images'} or not (
            images is None or isinstance(images, list)
            and 0 < len(images) <= _SYNC_LIMIT):
        raise exception.Invalid(
            f'the body may only be {{"images": [id, …]}}, with 1 to '
            f'{_SYNC_LIMIT} ids')
    return images and [journal.validate_image_id(one) for one in images]
