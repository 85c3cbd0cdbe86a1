# SPDX-License-Identifier: Apache-2.0
"""Options of eligibility: which images are built."""

from oslo_config import cfg

GROUP = 'eligibility'
OPTS = [
    cfg.ListOpt(
        'policies', default=['options'],
        help='Policies that must all agree, drivers of the namespace '
             'fastboot.eligibility. "options" goes by the options below.'),
    cfg.StrOpt(
        'default', default='cache', choices=['off', 'cache', 'microvm'],
        help='What images get that have no property "fastboot" of their '
             'own. "off": only images that ask for it are built. "microvm": '
             'they are also baked, for servers to be resumed; each bake '
             'takes minutes of a builder, and megabytes of every host.'),
    cfg.ListOpt(
        'formats', default=['raw', 'qcow2', 'vmdk', 'vdi', 'vhdx'],
        help='Values of disk_format that are built.'),
    cfg.ListOpt(
        'owners', default=[],
        help='Ids of the projects whose images are built. Empty: all.'),
    cfg.ListOpt(
        'visibilities',
        default=['public', 'community', 'shared', 'private'],
        help='Visibilities that are built. "public" alone keeps what '
             'projects upload for themselves out of the repository.'),
    cfg.IntOpt(
        'max_size', default=0, min=0,
        help='GiB that an image\'s file, or the disk in it, may have. 0: '
             'no limit.'),
]
