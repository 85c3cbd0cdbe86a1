# SPDX-License-Identifier: Apache-2.0
"""What agents tell the centre: the RPC endpoint of ``fastboot-centre``.

A host can say wrong things about itself (or by another's name: the bus tells
hosts not apart), and then people see wrong things, and garbage collection
keeps deregistered images longer, or no longer, than they are needed
(:mod:`fastboot_glance.needs`). Nothing else depends on reports. What depends
on observations, :mod:`fastboot_glance.observations` says.
"""

from collections.abc import Callable
from typing import Any

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_common.rpc import oslo_messaging
from fastboot_glance import observations, records, reports

LOG = logging.getLogger(__name__)


class Endpoint:
    """The methods that agents may call.

    :param store: where reports and observations are kept.
    :param observed: told of images that hosts observed; None: nobody wants
        to know.
    """

    def __init__(self, store: records.Records,
                 observed: Callable[[str], None] | None = None) -> None:
        self._records = store
        self._observed = observed

    @oslo_messaging.expose
    def report(self, context: dict[str, Any], report: Any) -> None:
        """Keep a host's report. Nobody waits: what is wrong is logged."""
        try:
            self._records.note_host(reports.check(report))
        except exception.Invalid as error:
            LOG.warning('report refused: %s', error)
        except exception.Unavailable as error:
            LOG.warning('report of %s is lost, the next will do: %s',
                        report['host'], error)

    @oslo_messaging.expose
    def observe(self, context: dict[str, Any], observation: Any) -> None:
        """Keep what guests of a host read. What is wrong is logged."""
        if self._observed is None:
            return
        try:
            told = observations.check(observation)
            known = self._records.build(told['image'])
            if known is None or (known.state, known.version) != (
                    'ready', told['serial']):
                raise exception.Invalid(
                    f'host {told["host"]}: image {told["image"]} is not '
                    f'ready, or has another serial')
            self._records.note_observation(told)
            self._observed(told['image'])
        except exception.Invalid as error:
            LOG.warning('observation refused: %s', error)
        except exception.Unavailable as error:
            LOG.warning('observation of %s is lost: %s', told['host'], error)
