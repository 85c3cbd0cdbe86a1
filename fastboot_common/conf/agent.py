# SPDX-License-Identifier: Apache-2.0
"""Options of the agent on a compute host."""

from oslo_config import cfg

GROUP = 'agent'
OPTS = [
    cfg.StrOpt(
        'host',
        help='Name of this host in reports, as Nova has it. Default: the '
             'host name.'),
    cfg.StrOpt(
        'group',
        help='Group that may call the agent: the one nova-compute runs in. '
             'Keep QEMU out of it. Default: that of [export] group.'),

    # Following the repository
    cfg.BoolOpt(
        'messaging', default=True,
        help='Hear from builders that there is a new version, and report to '
             'them, over [DEFAULT] transport_url. Off: the agent only looks '
             'every "interval", and nobody sees its state.'),
    cfg.IntOpt(
        'interval', default=300, min=1,
        help='Seconds between two looks at the repository. Announcements '
             'over the message bus come in between; this finds what they '
             'missed. Lower it where there is no message bus.'),
    cfg.IntOpt(
        'jitter', default=10, min=0,
        help='A sync waits up to so many seconds, by chance, so that not all '
             'hosts ask at once. Raise it with the number of hosts.'),
    cfg.StrOpt(
        'window', default='',
        help='Times of the day at which boot sets may be pulled, for '
             'instance "22:00-06:00" or "01:00-05:00,12:00-13:00" (local '
             'time). Empty: always. Images that this host is asked for come '
             'at any time.'),
    cfg.IntOpt(
        'sync_rate', default=0, min=0,
        help='Bytes a second that pulls of boot sets take at most, those '
             'aside that this host is asked for. 0: no limit but '
             '[repository] limit_rate.'),
    cfg.StrOpt(
        'thaw', default='first_use', choices=['first_use', 'eager'],
        help='When boot sets are decompressed into the volume: as the first '
             'guest comes (which costs it 0.1 to 0.4 s), or "eager" as they '
             'arrive, while there is room.'),
    cfg.StrOpt(
        'hydrate', default='leased', choices=['never', 'leased', 'all'],
        help='Which images are brought here whole, in the background: a '
             'guest whose image is complete needs no network. "never" keeps '
             'guests on the export; "all" takes the space of all images.'),
    cfg.IntOpt(
        'hydrate_delay', default=300, min=0,
        help='Seconds after which hydration of an image begins that a guest '
             'came for. Boots are over by then, and short-lived guests never '
             'cause it. Images that Nova is told to cache do not wait.'),
    cfg.IntOpt(
        'hydrate_rate', default=-1, min=-1,
        help='Bytes a second (decompressed) that hydration brings at most. '
             '-1: half of what the interfaces towards the repository can '
             'carry, by what the kernel says of them; no limit where it '
             'says nothing, as of many virtual ones, or the repository is a '
             'directory. 0: no limit.'),

    # Space and memory
    cfg.IntOpt(
        'min_free', default=4 << 30, min=0,
        help='Bytes that are kept free on the file system of the volumes: '
             'images without guests are evicted, least recently used first, '
             'and nothing more is pulled or hydrated. Guests\' own disks '
             'often lie there too: raise it to what they may grow by '
             'between two looks.'),
    cfg.IntOpt(
        'quota', default=0, min=0,
        help='Bytes that volumes and mirror may take together: images '
             'without guests are evicted and nothing more is pulled or '
             'hydrated, as with "min_free". What guests that run read comes '
             'all the same. 0: any.'),
    cfg.IntOpt(
        'lock_memory', default=0, min=0,
        help='Bytes of memory in which boot sets of "lock_images" and of '
             'pinned images are locked, so that they are never read from '
             'disk, however scarce memory is. 0: none.'),
    cfg.ListOpt(
        'lock_images', default=[],
        help='Ids of images whose boot sets are locked in memory, the most '
             'important first; pinned images follow. They are thawed for it.'),
    cfg.BoolOpt(
        'loop', default=False,
        help='Give each volume a read-only loop device without direct I/O. '
             'Guests whose disks have cache mode "none" then share the page '
             'cache. Needs root. What libvirt saves of a suspended or '
             'rescued server names the device, whose number is another '
             'after the host has rebooted: resume or unrescue servers '
             'before.'),

    # Guests
    cfg.FloatOpt(
        'acquire_wait', default=0.5, min=0.05, max=60,
        help='Seconds that a guest that comes waits for its boot set to be '
             'thawed, or for an eviction to end, before it takes the stock '
             'path. Must be lower than nova-compute\'s own limit.'),
    cfg.IntOpt(
        'lease_grace', default=600, min=60,
        help='Seconds after which a lease ends whose file never appeared. '
             'Longer than nova-compute takes from asking for an image to '
             'making its base file.'),
    cfg.IntOpt(
        'lease_interval', default=30, min=1,
        help='Seconds between two looks at the files of leases.'),
    cfg.BoolOpt(
        'manage_export', default=True,
        help='Start and watch the NBD export and its shield. They go on '
             'while the agent restarts. Off: somebody else runs them.'),
    cfg.BoolOpt(
        'resume_guests', default=True,
        help='Resume guests that paused because the export was away. Needs '
             'libvirt\'s Python module.'),
    cfg.StrOpt(
        'libvirt_uri', default='qemu:///system',
        help='Where guests are resumed.'),

    # What others see
    cfg.IntOpt(
        'observe', default=300, min=0,
        help='Seconds after a guest came in which its reads are recorded '
             'that the boot set does not have. The builders are told of '
             'them once, and by [builder] refresh add them to the boot set. '
             'Hydration that begins earlier hides some. 0: never.'),
    cfg.IntOpt(
        'report_interval', default=60, min=1,
        help='Seconds between two reports to the builders, beside those of '
             'changes.'),
    cfg.StrOpt(
        'metrics_address', default='127.0.0.1',
        help='Address at which Prometheus may read metrics.'),
    cfg.PortOpt(
        'metrics_port', default=0,
        help='Port of the metrics. 0: none.'),
]
