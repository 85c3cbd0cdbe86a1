# SPDX-License-Identifier: Apache-2.0
"""A lane in the hands of the agent, for nova-compute.

The files belong to the agent, which alone writes them. Here is what
:func:`fastboot_nova.microvm.resume.resume` needs of a lane. Neither libvirt
nor nova is imported.
"""

import logging
from collections.abc import Mapping
from typing import Final

from fastboot_common import exception
from fastboot_common.microvm import artifact, clone
from fastboot_nova import client

LOG = logging.getLogger(__name__)

#: How an attempt ended. Refused: before anything was loaded, by what the
#: instance is; failed: the µVM may be to blame.
RESUMED: Final = 'resumed'
REFUSED: Final = 'refused'
FAILED: Final = 'failed'
OUTCOMES: Final = (RESUMED, REFUSED, FAILED)


class Lane:
    """What was taken. Give it back, however it ends.

    :ivar path: of the file that libvirt restores.
    :ivar directory: of the artifact; its disk can be copied until the lane
        is given back.
    :ivar group: name of the class of hosts.
    """

    def __init__(self, agent: client.Agent, taken: client.Taken,
                 description: artifact.Description) -> None:
        self.path = taken.path
        self.directory = taken.directory
        self.group = taken.group
        self.description = description
        self._agent = agent
        self._taken = taken

    def dress(self, instance: clone.Instance) -> None:
        """Make the copy the instance's.

        :raises Unavailable: the agent does not, and why.
        """
        self._agent.dress(self._taken.token, instance.xml)

    def give_back(self, outcome: str, phase: str = '', reason: str = '',
                  seconds: Mapping[str, float] | None = None) -> None:
        """Be done with it. Never fails: the agent takes back what it misses.

        :param outcome: one of :data:`OUTCOMES`.
        :param phase: that it failed in.
        :param reason: in words.
        :param seconds: see
            :class:`fastboot_nova.microvm.resume.Resumed`.
        """
        _give_back(self._agent, self._taken, outcome, phase, reason, seconds)


def take(agent: client.Agent, image_id: str, holder: str) -> Lane:
    """Have a µVM of an image for an instance.

    :param holder: the instance's UUID; only with a definition of that one
        can the lane be dressed.
    :raises NotFound: this host has none of it, and why.
    :raises Busy: all are in use; a repeat may find one.
    :raises Corrupt: its description makes no sense.
    :raises Unavailable: the agent does not answer, or cannot now; or what
        it gives cannot be read.
    """
    taken = agent.take(image_id, holder)
    try:
        found = artifact.read(taken.directory)
    except (exception.FastbootError, OSError) as error:
        _give_back(agent, taken, FAILED, 'take', str(error))
        if isinstance(error, OSError):
            raise exception.Unavailable(str(error)) from error
        raise
    return Lane(agent, taken, found)


def _give_back(agent: client.Agent, taken: client.Taken, outcome: str,
               phase: str, reason: str,
               seconds: Mapping[str, float] | None = None) -> None:
    try:
        agent.give_back(taken.token, outcome, phase, reason, seconds)
    except exception.FastbootError as error:
        LOG.warning('%s is not given back: %s', taken.path, error)
