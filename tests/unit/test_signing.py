# SPDX-License-Identifier: Apache-2.0
"""Signed repositories: what their servers cannot do."""

import base64
import hashlib
import json
import os

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from disks import BLOCK, disk, make_repository, put
from oslo_config import cfg

from fastboot_common import exception, journal, repository, signing, store
from fastboot_common.cli import base
from fastboot_common.conf import opts
from fastboot_nova.mirror import Mirror

PEM = serialization.Encoding.PEM


def private(path, key=None):
    key = key or ed25519.Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(
        PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()))
    path.chmod(0o600)
    path.with_suffix('.pub').write_bytes(key.public_key().public_bytes(
        PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture
def keys(tmp_path):
    """The operator's key, and somebody else's."""
    return private(tmp_path / 'ours'), private(tmp_path / 'theirs')


def trust(*keys):
    return signing.Trust([key.with_suffix('.pub') for key in keys])


@pytest.fixture
def repo(tmp_path):
    return make_repository(tmp_path / 'repo')


def signed(repo, key):
    return repository.Repository(repo.store, signer=signing.Signer(key))


def publish(repo, tmp_path, image_id):
    return put(repo, tmp_path / 'work', image_id,
               disk(4 * BLOCK, image_id, zeros=0), boot=[0, 1])


def path(repo, number):
    return repo.store._root / store.entry_name(number)


def rewrite(repo, number, change):
    """What a server can do to an entry, and to all after it."""
    before = None
    while path(repo, number).exists():
        entry = json.loads(path(repo, number).read_bytes())
        if before is None:
            change(entry)
        else:
            entry['previous'] = before
        data = journal.canonical(entry)
        path(repo, number).unlink()
        path(repo, number).write_bytes(data)
        before = hashlib.sha256(data).hexdigest()
        number += 1


def test_a_signed_repository(repo, keys, tmp_path):
    ours, theirs = keys
    publish(signed(repo, ours), tmp_path, 'a')
    found = repository.Repository(repo.store, trust=trust(ours))
    assert set(found.state().images) == {'a'}
    # Who asks for no signatures reads it, too.
    assert set(repository.Repository(repo.store).state().images) == {'a'}
    for known in (trust(theirs), trust()):
        with pytest.raises(exception.Corrupt, match='trusted_keys'):
            repository.Repository(repo.store, trust=known).state()


def test_what_is_not_signed(repo, keys, tmp_path):
    publish(repo, tmp_path, 'a')
    found = repository.Repository(repo.store, trust=trust(keys[0]))
    with pytest.raises(exception.Corrupt, match='repo checkpoint'):
        found.state()
    signed(repo, keys[0]).checkpoint()
    assert set(found.state().images) == {'a'}


@pytest.mark.parametrize('change', [
    lambda entry: entry['image'].update(name='another'),
    lambda entry: entry['image'].update(manifest='ab' * 32),
    lambda entry: entry['image'].update(visibility='public', owner='x'),
    lambda entry: entry['packs'].append({'digest': 'cd' * 32, 'size': 5}),
    lambda entry: entry.update(time='2001-01-01T00:00:00+00:00'),
    lambda entry: entry.update(more='x'),
    lambda entry: entry.update(more=float('nan')),
    lambda entry: entry.update(signature=None),
    lambda entry: entry.update(signature='x'),
    lambda entry: entry.update(signature={'key': entry['signature']['key']}),
    lambda entry: entry['signature'].update(value='AAAA'),
    lambda entry: entry['signature'].update(value='?'),
    lambda entry: entry['signature'].update(value=5),
    lambda entry: entry['signature'].update(key=['x']),
])
@pytest.mark.parametrize('number', [1, 2])
def test_a_server_that_changes_an_entry(repo, keys, tmp_path, change,
                                        number):
    writer = signed(repo, keys[0])
    publish(writer, tmp_path, 'a')
    publish(writer, tmp_path, 'b')
    rewrite(repo, number, change)
    found = repository.Repository(repo.store, trust=trust(keys[0]))
    with pytest.raises(exception.Corrupt):
        found.state()
    assert not found._state.images


@pytest.mark.parametrize('change', [
    lambda data: data + b' ',
    lambda data: data.replace(b'"number":', b'"number": '),
    lambda data: data.replace(b'"key":', b'"more":1,"key":'),
    lambda data: data.replace(b'{', b'{"time":"x",', 1),
])
def test_a_server_that_spells_an_entry_otherwise(repo, keys, tmp_path,
                                                 change):
    """Whoever took it would not take what a builder appends to ours."""
    publish(signed(repo, keys[0]), tmp_path, 'a')
    data = path(repo, 1).read_bytes()
    path(repo, 1).unlink()
    path(repo, 1).write_bytes(change(data))
    assert change(data) != data
    mirror = Mirror(tmp_path / 'mirror', repo.store, trust(keys[0]))
    with pytest.raises(exception.Corrupt, match='signature is wrong'):
        mirror.refresh()
    path(repo, 1).unlink()
    path(repo, 1).write_bytes(data)
    publish(signed(repo, keys[0]), tmp_path, 'b')
    assert set(mirror.refresh().images) == {'a', 'b'}


def environment(repo, key, *trusted):
    conf = opts.register(cfg.ConfigOpts())
    conf([], default_config_files=[])
    conf.set_override('location', str(repo.store._root), 'repository')
    conf.set_override('signing_key', str(key), 'repository')
    conf.set_override('trusted_keys', [
        str(one.with_suffix('.pub')) for one in trusted], 'repository')
    return base.Environment(conf)


@pytest.mark.skipif(os.geteuid() != 0, reason='gives files to others')
def test_only_commands_mind_whose_it_is(repo, keys):
    """A builder that is root's reads what it wrote there itself."""
    os.chown(repo.store._root, 4242, -1)
    env = environment(repo, keys[0])
    env.writable_repository()
    with pytest.raises(exception.Invalid, match='belongs to #4242'):
        base.Environment(env.conf, by_hand=True).writable_repository()


def test_builders_sign_on_nothing_that_they_did_not_sign(repo, keys,
                                                         tmp_path):
    ours, theirs = keys
    publish(environment(repo, ours).writable_repository(), tmp_path, 'a')
    publish(repo, tmp_path, 'evil')
    builder = environment(repo, ours).writable_repository()
    with pytest.raises(exception.Corrupt, match='checkpoint --vouch'):
        publish(builder, tmp_path, 'b')
    with pytest.raises(exception.Corrupt, match='checkpoint --vouch'):
        builder.checkpoint()
    # Who knows that it was a friend may say so.
    environment(repo, ours).writable_repository(vouch=True).checkpoint()
    publish(builder, tmp_path, 'b')
    # The other key is the new one.
    with pytest.raises(exception.Corrupt, match='checkpoint --vouch'):
        environment(repo, theirs).writable_repository().state()
    publish(environment(repo, theirs, ours).writable_repository(),
            tmp_path, 'c')
    assert set(environment(repo, theirs).open_repository().state(
        ).images) == {'a', 'b', 'c', 'evil'}


def test_a_server_that_adds_an_entry(repo, keys, tmp_path):
    publish(signed(repo, keys[0]), tmp_path, 'a')
    found = repository.Repository(repo.store, trust=trust(keys[0]))
    found.state()
    other = signed(repo, keys[1])
    publish(other, tmp_path, 'b')
    with pytest.raises(exception.Corrupt, match='trusted_keys'):
        found.state()
    assert set(found._state.images) == {'a'}
    # Nor may it take a signature from elsewhere.
    good = json.loads(path(repo, 1).read_bytes())['signature']
    rewrite(repo, 2, lambda entry: entry.update(signature=good))
    with pytest.raises(exception.Corrupt, match='signature is wrong'):
        found.state()


@pytest.mark.parametrize('more', [
    rb'"\ud800"', b'[' * 400 + b']' * 400, b'1' * 4000, b'-1e999'])
def test_entries_without_a_canonical_form(repo, keys, tmp_path, more):
    publish(signed(repo, keys[0]), tmp_path, 'a')
    data = path(repo, 1).read_bytes()
    path(repo, 1).unlink()
    path(repo, 1).write_bytes(data[:-1] + b',"more":' + more + b'}')
    found = repository.Repository(repo.store, trust=trust(keys[0]))
    with pytest.raises(exception.Corrupt):
        found.state()


def test_an_entry_of_another_repository(repo, keys, tmp_path):
    """Signed by the right key, first of its journal, and not ours."""
    other = make_repository(tmp_path / 'other')
    publish(signed(other, keys[0]), tmp_path, 'a')
    path(repo, 1).parent.mkdir(exist_ok=True)
    path(repo, 1).write_bytes(path(other, 1).read_bytes())
    found = repository.Repository(repo.store, trust=trust(keys[0]))
    with pytest.raises(exception.Corrupt, match='signature is wrong'):
        found.state()


def test_keys_are_exchanged(repo, keys, tmp_path):
    old, new = keys
    publish(signed(repo, old), tmp_path, 'a')
    both, later = trust(old, new), trust(new)
    assert repository.Repository(repo.store, trust=both).state()
    publish(signed(repo, new), tmp_path, 'b')
    # The new signature vouches for the old entry.
    found = repository.Repository(repo.store, trust=later)
    assert set(found.state().images) == {'a', 'b'}


def test_a_host_that_begins_to_ask(repo, keys, tmp_path):
    """What it mirrored before is proven, too, and not by its own copy."""
    publish(repo, tmp_path, 'a')
    Mirror(tmp_path / 'mirror', repo.store).refresh()
    again = Mirror(tmp_path / 'mirror', repo.store, trust(keys[0]))
    with pytest.raises(exception.Corrupt, match='not signed'):
        again.refresh()
    signed(repo, keys[0]).checkpoint()
    assert set(again.refresh().images) == {'a'}
    # And again from what was saved, with nothing new.
    last = Mirror(tmp_path / 'mirror', repo.store, trust(keys[0]))
    assert set(last.refresh().images) == {'a'}
    rewrite(repo, 2, lambda entry: entry.update(time='2001-01-01T00:00+00'))
    other = Mirror(tmp_path / 'mirror', repo.store, trust(keys[0]))
    with pytest.raises(exception.Corrupt, match='rewritten'):
        other.refresh()


def test_keys_that_are_none(tmp_path, keys):
    with pytest.raises(exception.ConfigError, match='gone'):
        signing.Signer(tmp_path / 'gone')
    with pytest.raises(exception.ConfigError, match='gone'):
        signing.Trust([tmp_path / 'gone'])
    keys[0].chmod(0o644)
    with pytest.raises(exception.ConfigError, match='chmod'):
        signing.Signer(keys[0])
    curve = private(tmp_path / 'curve', ec.generate_private_key(
        ec.SECP256R1()))
    with pytest.raises(exception.ConfigError, match='ed25519'):
        signing.Signer(curve)
    with pytest.raises(exception.ConfigError, match='ed25519'):
        trust(curve)
    for words in (b'', b'nonsense', b'-----BEGIN PUBLIC KEY-----\nx\n'):
        curve.write_bytes(words)
        with pytest.raises(exception.ConfigError):
            signing.Signer(curve)
        with pytest.raises(exception.ConfigError):
            signing.Trust([curve])


def pem_of(words, key, old, new):
    data = key.replace(old, new)
    assert data != key
    return (b'-----BEGIN %b-----\n%b-----END %b-----\n' % (
        words, base64.encodebytes(data), words))


def test_keys_of_a_kind_that_nobody_knows(tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    der, known, new = serialization.Encoding.DER, b'\x2bep', b'\x2be\x20'
    path = tmp_path / 'key'
    path.write_bytes(pem_of(b'PUBLIC KEY', key.public_key().public_bytes(
        der, serialization.PublicFormat.SubjectPublicKeyInfo), known, new))
    with pytest.raises(exception.ConfigError):
        signing.Trust([path])
    path.write_bytes(pem_of(b'PRIVATE KEY', key.private_bytes(
        der, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()), known, new))
    path.chmod(0o600)
    with pytest.raises(exception.ConfigError):
        signing.Signer(path)
    # Said to be of another kind (X448), and too short for that.
    path.write_bytes(pem_of(b'PRIVATE KEY', key.private_bytes(
        der, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()), known, b'\x2beo'))
    with pytest.raises(exception.ConfigError):
        signing.Signer(path)
