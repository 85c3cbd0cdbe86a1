# SPDX-License-Identifier: Apache-2.0
"""Checks of what centre and hosts both need: repository and message bus."""

import threading
from typing import Any, Final

from oslo_upgradecheck import upgradecheck

from fastboot_common import exception, journal
from fastboot_common.cli import base
from fastboot_common.upgradecheck import result

_BUS_SECONDS: Final = 30


def repository(conf: Any) -> upgradecheck.Result:
    """Can the repository be read, and has it numbers for new images?"""
    environment = base.Environment(conf)
    try:
        state = environment.open_repository().state()
    except PermissionError as error:
        return result.failure(f'{error}; run this as the user of the '
                              f'service, or let that user read it')
    words = (f'{environment.location()} has version {state.version} with '
             f'{len(state.images)} images')
    if state.version < journal.SERIAL_WARNING:
        return result.success(words)
    answer = result.warning if journal.serials_left(
        state.version) else result.failure
    return answer(f'{words}; {journal.describe_serials(state.version)}')


def bus(conf: Any) -> upgradecheck.Result:
    """Does the message bus take a message?"""
    from fastboot_common import rpc
    transport = rpc.transport(conf)
    if conf.transport_url in (None, 'rabbit://'):
        return result.warning(
            '[DEFAULT] transport_url is not set: hosts do not hear of new '
            'images before their next look, and nobody sees their state')
    errors: list[BaseException] = []
    done = threading.Thread(target=_send, args=(transport, errors),
                            daemon=True)
    done.start()
    done.join(_BUS_SECONDS)
    if done.is_alive():
        raise exception.Unavailable(
            f'the message bus did not answer within {_BUS_SECONDS} s; see '
            f'[DEFAULT] transport_url, and the broker\'s log')
    if errors:
        raise exception.Unavailable(
            f'the message bus does not take messages: {errors[0]}; see '
            f'[DEFAULT] transport_url, and the broker\'s log')
    return result.success('the message bus takes messages')


def _send(transport: Any, errors: list[BaseException]) -> None:
    """A message to nobody, which the broker drops."""
    import oslo_messaging

    from fastboot_common import rpc
    target = oslo_messaging.Target(exchange=rpc.EXCHANGE,
                                   topic='fastboot-status')
    try:
        oslo_messaging.get_rpc_client(transport, target, retry=0).cast(
            {}, 'check')
    except Exception as error:
        errors.append(error)


CHECKS: Final[list[tuple[str, result.Check]]] = [
    ('Repository', repository), ('Message bus', bus)]
