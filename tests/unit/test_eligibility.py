# SPDX-License-Identifier: Apache-2.0
"""Which images are built."""

import dataclasses

import pytest

pytest.importorskip('keystoneauth1')

from oslo_config import cfg

from fastboot_common import exception
from fastboot_common.conf import eligibility as options
from fastboot_glance import eligibility, images

GIB = 1 << 30
IMAGE = images.Image.parse({
    'id': '7f3b', 'name': 'debian', 'status': 'active', 'size': 600 << 20,
    'virtual_size': 2 * GIB, 'disk_format': 'qcow2',
    'container_format': 'bare', 'owner': 'alice', 'visibility': 'private',
    'os_hash_algo': 'sha512', 'os_hash_value': 'ab', 'tags': ['a'],
    'protected': False, 'os_version': '12'})


def refuse(image=IMAGE, properties=None, changes=None, **values):
    conf = cfg.ConfigOpts()
    conf.register_opts(options.OPTS, group=options.GROUP)
    conf([], default_config_files=[])
    for name, value in values.items():
        conf.set_override(name, value, group=options.GROUP)
    image = dataclasses.replace(
        image, properties={**image.properties, **(properties or {})},
        **(changes or {}))
    return eligibility.Policies(conf).refuse(image)


def test_parsed():
    assert IMAGE.properties == {'os_version': '12'}
    assert IMAGE.wish is None


@pytest.mark.parametrize('values', [
    {}, {'properties': {'fastboot': 'cache'}, 'default': 'off'},
    {'properties': {'fastboot': 'microvm'}}, {'owners': ['bob', 'alice']},
    {'max_size': 2}, {'properties': {'kernel_id': ''}},
    {'changes': {'virtual_size': None}}, {'policies': []}])
def test_built(values):
    assert refuse(**values) is None


@pytest.mark.parametrize('word, values', [
    ('off', {'properties': {'fastboot': 'off'}}),
    ('only with', {'default': 'off'})])
def test_switched_off(word, values):
    found = refuse(**values)
    assert found.off and word in found.reason


@pytest.mark.parametrize('word, values', [
    ("fastboot='On'", {'properties': {'fastboot': 'On'}}),
    (r"fastboot='x\ny'", {'properties': {'fastboot': 'x\ny'}}),
    ('docker', {'changes': {'container_format': 'docker'}}),
    ('iso', {'changes': {'disk_format': 'iso'}}),
    ('qcow2', {'formats': ['raw']}),
    ('kernel', {'properties': {'kernel_id': 'x'}}),
    ('encrypted', {'properties': {'cinder_encryption_key_id': 'x'}}),
    ('volume', {'properties': {'block_device_mapping': '[{}]'}}),
    ('alice', {'owners': ['bob']}),
    ('private', {'visibilities': ['public']}),
    ('no data', {'changes': {'size': 0}}),
    ('1 GiB', {'max_size': 1})])
def test_skipped(word, values):
    found = refuse(**values)
    assert not found.off and word in found.reason


def test_unknown_policy():
    with pytest.raises(exception.ConfigError, match='no-such'):
        refuse(policies=['options', 'no-such'])


def test_every_policy_must_agree(monkeypatch):
    class Monday:
        def __init__(self, conf):
            pass

        def refuse(self, image):
            return eligibility.Refusal('not on Mondays')

    monkeypatch.setitem(eligibility._OURS, 'monday', Monday)
    assert refuse(policies=['options', 'monday']).reason == 'not on Mondays'
