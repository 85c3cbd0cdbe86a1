# SPDX-License-Identifier: Apache-2.0
"""What agents tell the centre: the RPC endpoint of ``fastboot-centre``.

A host can say wrong things about itself (or by another's name: the bus tells
hosts not apart), and then people see wrong things. Nothing else depends on
reports.
"""

from typing import Any

from oslo_log import log as logging

from fastboot_common import exception
from fastboot_common.rpc import oslo_messaging
from fastboot_glance import records, reports

LOG = logging.getLogger(__name__)


class Endpoint:
    """The methods that agents may call.

    :param store: where reports are kept.
    """

    def __init__(self, store: records.Records) -> None:
        self._records = store

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
