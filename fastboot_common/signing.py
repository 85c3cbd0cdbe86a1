# SPDX-License-Identifier: Apache-2.0
"""Signatures of the journal's entries (ed25519, RFC 8032).

Each entry holds the digest of the one before, and names what it brings by
digest: who trusts the newest entry can prove every byte of a repository. So
only the newest entry needs a signature of a key that is trusted now.
"""

import base64
import binascii
import hashlib
import json
import pathlib
import stat
from collections.abc import Sequence
from typing import Any, Final

from cryptography.exceptions import (
    InternalError,
    InvalidSignature,
    UnsupportedAlgorithm,
)
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fastboot_common import exception, journal

#: Before what is signed, so that no other signature of the key fits.
_PURPOSE: Final = b'fastboot-journal\n'
_KEY_LIMIT: Final = 64 << 10
_CURE: Final = ('where this is the repository as you know it, "fastbootctl '
                'repo checkpoint --vouch" signs it')
#: What cryptography says of what is no key that it knows.
_NO_KEY: Final = (ValueError, TypeError, UnsupportedAlgorithm, InternalError)


class Signer:
    """Signs entries with an operator's key."""

    def __init__(self, path: pathlib.Path) -> None:
        """Read a private key (PEM, ed25519, without a password).

        :raises ConfigError: there is none, or others may read it.
        """
        data = _read(path)
        if path.stat().st_mode & stat.S_IRWXO:
            raise exception.ConfigError(
                f'[repository] signing_key: {path} can be used by everybody '
                f'on this machine; chmod o= {path}')
        try:
            key = serialization.load_pem_private_key(data, None)
        except _NO_KEY as error:
            raise exception.ConfigError(f'{path}: {error}') from error
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise exception.ConfigError(f'{path} is not an ed25519 key')
        self._key = key
        self.public_key = key.public_key()
        self.key_id = _key_id(self.public_key)

    def sign(self, entry: bytes, repository: str) -> bytes:
        """The bytes of an entry, signed.

        :param entry: from :func:`fastboot_common.journal.make`.
        :param repository: the id of the repository.
        """
        found = json.loads(entry)
        value = self._key.sign(_message(found, repository))
        return _signed(found, self.key_id, value)


class Trust:
    """Checks entries against the keys that are trusted."""

    def __init__(self, paths: Sequence[pathlib.Path],
                 signer: Signer | None = None) -> None:
        """Read public keys (PEM, ed25519).

        :param signer: who signs here, and believes itself.
        :raises ConfigError: one is missing, or none.
        """
        keys = [_public(path) for path in paths]
        if signer:
            keys.append(signer.public_key)
        self._keys = {_key_id(key): key for key in keys}

    def check(self, data: bytes, number: int, repository: str) -> None:
        """Prove that an entry is of somebody who is trusted.

        :param data: the bytes of entry `number`.
        :param repository: the id of the repository.
        :raises Corrupt: it is not.
        """
        entry = journal.parse(data, number)
        key_id, value = self._signature(entry, number)
        key = self._keys.get(key_id)
        if key is None:
            raise exception.Corrupt(
                f'journal entry {number} is signed with key {key_id!r}, '
                f'which is not one of [repository] trusted_keys; {_CURE}')
        try:
            key.verify(value, _message(entry, repository))
            # The next entry names these bytes, in no other spelling.
            if data != _signed(entry, key_id, value):
                raise ValueError('spelling')
        # JSON may hold what has no canonical form, such as half a character.
        except (InvalidSignature, ValueError, RecursionError):
            raise exception.Corrupt(
                f'journal entry {number}: its signature is wrong; the '
                f'repository must not be trusted') from None

    @staticmethod
    def _signature(entry: dict[str, Any], number: int) -> tuple[str, bytes]:
        found = entry.get('signature')
        if found is None:
            raise exception.Corrupt(
                f'journal entry {number} is not signed, and [repository] '
                f'trusted_keys or signing_key wants that; {_CURE}')
        try:
            key_id = found['key']
            if not isinstance(key_id, str):
                raise TypeError('key')
            return key_id, base64.b64decode(found['value'], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise exception.Corrupt(f'journal entry {number}: signature: '
                                    f'{error!r}') from error


def _signed(entry: dict[str, Any], key_id: str, value: bytes) -> bytes:
    return journal.canonical({**entry, 'signature': {
        'key': key_id, 'value': base64.b64encode(value).decode()}})


def _message(entry: dict[str, Any], repository: str) -> bytes:
    return _PURPOSE + repository.encode() + b'\n' + journal.canonical(
        {**entry, 'signature': None})


def _read(path: pathlib.Path) -> bytes:
    try:
        with path.open('rb') as file:
            return file.read(_KEY_LIMIT)
    except OSError as error:
        raise exception.ConfigError(f'key {path}: {error}') from error


def _public(path: pathlib.Path) -> ed25519.Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(_read(path))
    except _NO_KEY as error:
        raise exception.ConfigError(f'key {path}: {error}') from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise exception.ConfigError(f'{path} is not an ed25519 key')
    return key


def _key_id(key: ed25519.Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]
