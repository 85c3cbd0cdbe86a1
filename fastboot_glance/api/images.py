# SPDX-License-Identifier: Apache-2.0
"""``/v1/images``."""

import uuid
from typing import Any

from fastboot_common import exception, journal
from fastboot_glance import records, reports
from fastboot_glance.api import overview
from fastboot_glance.api.call import Call, Conflict


def index(call: Call) -> tuple[int, dict[str, Any]]:
    """List images."""
    call.authorize('images:list')
    words = call.words(
        'name', 'state', 'owner', 'host', 'hosts', 'limit', 'marker')
    if words.get('hosts', 'true') not in ('true', 'false'):
        raise exception.Invalid('hosts is neither "true" nor "false"')
    state = call.parts.state()
    builds = {one.image_id: one for one in call.parts.records.builds()}
    rows = [
        row for image_id in sorted(state.images.keys() | builds.keys())
        if _matches(row := overview.image_row(
            image_id, state.images.get(image_id), builds.get(image_id)),
            words) and call.may('images:show', row['owner'])]
    shown, links = call.page('images', rows, 'id', words)
    hosts = _hosts(call, words.get('host'))
    microvms = overview.microvm_states(call.parts.records.microvms())
    for row in shown:
        row['microvm'] = microvms.get(row['id'])
        _add_hosts(call, row, state.images.get(row['id']), hosts)
        if words.get('hosts') == 'false':
            del row['hosts']
    return 200, {'images': shown, 'version': state.version, **links}


def _matches(row: dict[str, Any], words: dict[str, str]) -> bool:
    return all(row[key] == words[key]
               for key in ('name', 'state', 'owner') if key in words)


def _hosts(call: Call, name: str | None) -> list[records.Host]:
    """The hosts to speak of: all, the one named, or none if that is the
    policy."""
    if name is not None:
        call.authorize('hosts:list')
        host = call.parts.records.host(reports.validate_host(name))
        if host is None:
            raise exception.NotFound(f'host {name} has never reported')
        return [host]
    return call.parts.records.hosts() if call.may('hosts:list') else []


def _add_hosts(call: Call, row: dict[str, Any], image: journal.Image | None,
               hosts: list[records.Host]) -> None:
    row['hosts'] = {host.name: overview.on_host(
        image, row['id'], host, call.clock) for host in hosts}
    row['host_states'] = overview.count(row['hosts'].values())


def show(call: Call, image_id: str) -> tuple[int, dict[str, Any]]:
    """Show an image."""
    image, build = _find(call, image_id, 'images:show')
    call.words()
    if image is None and build is None:
        raise exception.NotFound(f'image {image_id} is not known')
    row = overview.image_row(image_id, image, build)
    if image:
        manifest = call.parts.manifest(image.manifest)
        row['boot_size'] = len(manifest.boot) * manifest.block_size
        row['capture'] = manifest.capture
    hosts = _hosts(call, None)
    _add_hosts(call, row, image, hosts)
    row['microvms'] = overview.microvm_rows(
        call.parts.records.microvms(image_id), call.parts.microvms(image_id),
        image_id, hosts)
    return 200, {'image': row}


def _find(call: Call, image_id: str, rule: str,
          ) -> tuple[journal.Image | None, records.Build | None]:
    """What is known of an image that the caller may do this to."""
    journal.validate_image_id(image_id)
    image = call.parts.state().images.get(image_id)
    build = call.parts.records.build(image_id)
    owner = image.owner if image else build.owner if build else ''
    call.authorize(rule, owner)
    return image, build


def act(call: Call, image_id: str) -> tuple[int, dict[str, Any]]:
    """Build or refresh an image."""
    body = call.body()
    action = next(iter(body), '')
    if len(body) != 1 or action not in ('build', 'refresh') or body[
            action] not in (None, {}):
        raise exception.Invalid(
            'the body must be {"build": {}} or {"refresh": {}}')
    image, build = _find(call, image_id, f'images:{action}')
    _validate_uuid(image_id)
    if image is None and action == 'refresh':
        raise Conflict(f'image {image_id} has no cache to refresh; build it')
    call.parts.post_build(image_id, force=action == 'refresh')
    return 202, {'image': overview.image_row(
        image_id, image, call.parts.records.build(image_id)
        or build or records.Build(image_id, state='queued'))}


def _validate_uuid(image_id: str) -> None:
    try:
        uuid.UUID(image_id)
    except ValueError:
        raise exception.Invalid(
            f'not the id of an image in Glance, and builders know no other: '
            f'{image_id!r}') from None
