# SPDX-License-Identifier: Apache-2.0
"""The head of the files that libvirt saves guests to.

libvirt compares name and UUID of what it restores only with the XML in the
file itself, and QEMU with nothing: whoever rewrites that XML has the same
guest under another name (libvirt 9.0 to 11.3). All numbers are
little-endian, as x86 and AArch64 write them::

    0   magic "LibvirtQemudSave"       28  compression (0: none)
    16  version (2)                    32  where the cookie is, from 92; or 0
    20  length of the data             36  14 words of zeros
    24  1 if the guest was running     92  data: XML, NUL, cookie, NUL, zeros

QEMU's stream follows the data, so its place stays if the length does.
"""

import dataclasses
import os
import struct
from typing import Final, Self

from fastboot_common import exception
from fastboot_common.microvm import document

MAGIC: Final = b'LibvirtQemudSave'
VERSION: Final = 2
#: Bytes in front of the data.
HEADER: Final = 92
_STRUCT: Final = struct.Struct('<16s5I56s')
#: XML, cookie, and the 64 KiB that libvirt leaves for them to grow.
DATA_LIMIT: Final = 2 * document.LIMIT


@dataclasses.dataclass(frozen=True)
class SaveFile:
    """What is in front of the stream.

    :ivar xml: of the domain.
    :ivar cookie: libvirt's own notes, XML as well; empty: none.
    :ivar data_length: bytes between header and stream.
    :ivar running: the guest ran when it was saved.
    """

    xml: str
    cookie: str
    data_length: int
    running: bool = True

    @property
    def stream(self) -> int:
        """Where QEMU's stream begins, in bytes."""
        return HEADER + self.data_length

    @classmethod
    def parse(cls, data: bytes, what: str = 'save file') -> Self:
        """Read the head of a file.

        :param data: the file's beginning, the stream's place at least.
        :raises Corrupt: it is none, or has something that libvirt would not
            write.
        :raises UnknownVersion: it is of a newer libvirt.
        """
        length, running, cookie_at = _header(data, what)
        body = data[HEADER:HEADER + length]
        if len(body) != length:
            raise exception.Corrupt(f'{what}: cut off')
        xml, rest = _string(body, what)
        cookie = b''
        if cookie_at:
            if cookie_at != len(xml) + 1:
                raise exception.Corrupt(f'{what}: no cookie at {cookie_at}')
            cookie, rest = _string(rest, what)
            if not cookie:
                raise exception.Corrupt(f'{what}: the cookie is empty')
        if rest.strip(b'\0'):
            raise exception.Corrupt(f'{what}: no zeros behind the XML')
        try:
            found = cls(xml.decode(), cookie.decode(), length, running)
        except UnicodeDecodeError as error:
            raise exception.Corrupt(f'{what}: {error}') from error
        document.parse(found.xml)
        return found

    @classmethod
    def read(cls, fd: int, what: str = 'save file') -> Self:
        """Read the head of an open file; see :meth:`parse`."""
        head = os.pread(fd, HEADER, 0)
        length = _header(head, what)[0]
        return cls.parse(head + os.pread(fd, length, HEADER), what)

    def pack(self) -> bytes:
        """The bytes in front of the stream.

        :raises Invalid: XML and cookie do not fit, or hold a NUL.
        """
        xml, cookie = self.xml.encode(), self.cookie.encode()
        if b'\0' in xml or b'\0' in cookie:
            raise exception.Invalid('save file: NUL in a string')
        data = xml + b'\0' + (cookie + b'\0' if cookie else b'')
        if len(data) > self.data_length:
            raise exception.Invalid(
                f'save file: {len(data)} bytes do not fit into the '
                f'{self.data_length} in front of the stream')
        header = _STRUCT.pack(
            MAGIC, VERSION, self.data_length, self.running, 0,
            len(xml) + 1 if cookie else 0, bytes(56))
        return header + data.ljust(self.data_length, b'\0')

    def having(self, xml: str) -> Self:
        """The same with another XML. The stream stays where it is."""
        return dataclasses.replace(self, xml=xml)


def _header(data: bytes, what: str) -> tuple[int, bool, int]:
    """Length of the data, whether it ran, and where the cookie is."""
    if len(data) < HEADER:
        raise exception.Corrupt(f'{what}: too short')
    magic, version, length, running, compression, cookie_at, unused = \
        _STRUCT.unpack_from(data)
    if magic != MAGIC:
        raise exception.Corrupt(f'{what}: not saved by libvirt')
    if version != VERSION:
        raise exception.UnknownVersion(f'{what}: version {version}')
    if compression:
        raise exception.Corrupt(f'{what}: compressed ({compression})')
    if not 0 < length <= DATA_LIMIT or running > 1 or any(unused):
        raise exception.Corrupt(f'{what}: its header makes no sense')
    return length, bool(running), cookie_at


def _string(data: bytes, what: str) -> tuple[bytes, bytes]:
    """Up to the first NUL, and what is behind it."""
    found, nul, rest = data.partition(b'\0')
    if not nul:
        raise exception.Corrupt(f'{what}: a string without end')
    return found, rest
