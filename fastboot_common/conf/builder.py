# SPDX-License-Identifier: Apache-2.0
"""Options of the builders: how jobs become published images."""

from oslo_config import cfg

GROUP = 'builder'
OPTS = [
    cfg.StrOpt(
        'workdir',
        help='Directory for downloads, raw copies and guests\' disks, for '
             'each worker up to twice an image\'s virtual size. Default: '
             '"work" in state_dir. Builders on one machine may share it.'),
    cfg.IntOpt(
        'copy_limit', default=0, min=0,
        help='GiB on disk that the raw copy of an image may take: zeros take '
             'nothing. An image with more is refused; a small file can hold '
             'terabytes, and no other image would be built meanwhile. 0: '
             'the size of the file system of "workdir", divided by the '
             'workers here, of builds and of bakes, and one; another builder '
             'may have a larger one, so the image is tried again after '
             '"error_hours".'),
    cfg.IntOpt(
        'workers', default=1, min=1, max=64,
        help='Images that this builder builds at a time. Each needs the '
             'memory and processors that [capture] names.'),
    cfg.IntOpt(
        'attempts', default=3, min=1,
        help='How often a build is tried before the image is in error. '
             'Builders that died count; what can never succeed is tried '
             'once. Where a disk is full it is put off, and does not '
             'count.'),
    cfg.FloatOpt(
        'error_hours', default=6.0, min=0,
        help='Hours after which the audit has an image in error tried again, '
             'if it was not the image\'s fault: Glance, its store or the '
             'repository failed, builders died, or the disk of one was too '
             'small. 0: never.'),
    cfg.IntOpt(
        'retry_wait', default=30, min=0,
        help='Seconds between the first two attempts. It doubles with each '
             'further one, up to ten minutes.'),
    cfg.IntOpt(
        'wait_active', default=86400, min=1,
        help='Seconds that a job waits for its image to become active: the '
             'import plugin posts it before Glance has stored the data. '
             'Nothing is lost after that, notification and audit find the '
             'image.'),
    cfg.FloatOpt(
        'poll', default=1.0, min=0.1,
        help='Seconds between two looks at the jobboard.'),
    cfg.IntOpt(
        'audit_interval', default=600, min=1,
        help='Seconds between two comparisons of Glance with the '
             'repository. They find what no notification told.'),
    cfg.IntOpt(
        'audit_removals', default=20, min=0,
        help='Images that one audit deregisters at most. If more are '
             'missing in Glance it removes none and logs an error: perhaps '
             'it looks at the wrong Glance, or may not see all images. '
             'Raise it after images were deleted in numbers while '
             'notifications were off.'),
    cfg.StrOpt(
        'refresh', default='always', choices=[
            ('never', 'boot sets stay as they are'),
            ('failed', 'images that did not boot here get one'),
            ('always', 'those of other images grow, too')],
        help='Which boot sets get what guests of compute hosts read in '
             'their first minutes and did not find there. A boot set that '
             'is there grows by a quarter or 16 MiB at a time, whichever is '
             'more, and at most four times.'),
    cfg.IntOpt(
        'refresh_hosts', default=2, min=1,
        help='Hosts that must have missed a block before it is added to a '
             'boot set. An image without one gets what a single host '
             'tells.'),
    cfg.IntOpt(
        'upkeep_interval', default=3600, min=1,
        help='Seconds between two collections of garbage in repository, '
             'workdir and logbooks.'),
]
