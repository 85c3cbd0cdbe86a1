# SPDX-License-Identifier: Apache-2.0
"""Options of the repository."""

from oslo_config import cfg

from fastboot_common import blocks

GROUP = 'repository'
OPTS = [
    cfg.StrOpt(
        'location',
        help='Directory, or http:// or https:// URL of the repository. '
             'Builders need a directory. Default: "repository" in state_dir.'),
    cfg.ListOpt(
        'replicas', default=[],
        help='Further URLs, or directories, of the same repository, for '
             'hosts: reads are spread over "location" and these, and go on '
             'with the others while one fails. What they give is checked; '
             'they may be behind each other for a while.'),
    cfg.IntOpt(
        'block_size', default=blocks.DEFAULT_BLOCK_SIZE,
        choices=list(blocks.BLOCK_SIZES),
        help='Bytes of a block of a new repository. It cannot be changed '
             'later. The default was chosen by measurement.'),
    cfg.IntOpt(
        'compression_level', default=3, min=1, max=19,
        help='zstd level of blocks that no boot reads. Higher: smaller '
             'packs, slower publishing.'),
    cfg.IntOpt(
        'boot_compression_level', default=9, min=1, max=19,
        help='zstd level of boot sets. They are few and go to every host, so '
             'that a higher level pays.'),
    cfg.IntOpt(
        'threads', default=0, min=0,
        help='Threads that hash and compress. 0: one a CPU.'),
    cfg.FloatOpt(
        'retention_days', default=7.0, min=0,
        help='Days that packs of a deregistered image are kept at least, '
             'for hosts that still have guests of it. They are kept longer '
             'while a host\'s report says that its guests need them; for '
             'hosts that do not report ([agent] messaging) nothing else '
             'keeps them.'),
    cfg.IntOpt(
        'repack_below', default=50, min=0, max=100,
        help='Percent of a pack\'s blocks that images need below which gc '
             'rewrites the pack; the old one goes after "retention_days". '
             'Higher: less space, and hosts fetch boot sets again that were '
             'in such packs. 0: never.'),
    cfg.FloatOpt(
        'grace_hours', default=24.0, min=0,
        help='Hours that gc leaves a file alone that no journal entry names: '
             'a publisher may be about to name it. Must be longer than any '
             'publishing takes.'),
    cfg.FloatOpt(
        'timeout', default=10.0, min=0.1,
        help='Seconds that an HTTP request may be silent.'),
    cfg.IntOpt(
        'retries', default=5, min=0,
        help='How often a failed HTTP request is repeated before the '
             'repository counts as out of reach.'),
    cfg.IntOpt(
        'limit_rate', default=0, min=0,
        help='Bytes a second that one process takes from an HTTP repository '
             'at most. 0: no limit.'),
    cfg.StrOpt(
        'signing_key',
        help='File of the private key (PEM, ed25519) that signs what is '
             'published; for builders. Keep it from everybody else. '
             'Default: nothing is signed.'),
    cfg.ListOpt(
        'trusted_keys', default=[],
        help='Files of public keys (PEM, ed25519). With any, only a '
             'repository whose newest journal entry is signed with one of '
             'them is believed, whoever serves it. Name the new key beside '
             'the old one while keys are exchanged.'),
    cfg.StrOpt(
        'ca_file',
        help='File of CA certificates for an https:// repository. Default: '
             'the system\'s.'),
]
