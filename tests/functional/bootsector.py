# SPDX-License-Identifier: Apache-2.0
"""A guest of one sector, which costs no boot time.

It reads runs of 4 KiB, prints a text on the serial console, reads some more
and halts.
Made with ``as`` and ``ld -Ttext 0x7c00 --oformat binary`` of::

    .code16
    _start:
     cli; xorw %ax,%ax; movw %ax,%ds; movw %ax,%ss; movw $0x7c00,%sp
     sti; cld; movb %dl,drive
    next:
     cmpw $0,count; je say
     movw $8,dap+2; movw $dap,%si; movb $0x42,%ah; movb drive,%dl
     int $0x13
     movl step,%eax; addl %eax,dap+8; decw count; jmp next
    say:
     movw $text,%si; movw $0x3f8,%dx
    1: lodsb; testb %al,%al; jz 2f; outb %al,%dx; jmp 1b
    2: movb $0,text; xorw %ax,%ax; xchgw %ax,more; movw %ax,count
     testw %ax,%ax; jnz next
    halt: hlt; jmp halt
    .org 0x100
    count: .word 0
    step: .long 0
    dap: .byte 16,0; .word 8; .word 0,0x1000; .quad 0
    drive: .byte 0
    more: .word 0
    .org 0x140
    text: .byte 0
    .org 510
    .word 0xaa55
"""

import pathlib
import struct

CODE = bytes.fromhex(
    'fa31c08ed88ed0bc007cfbfc8816167d833e007d007420c706087d0800be067db4428a'
    '16167dcd1366a1027d6601060e7dff0e007debd9be407dbaf803ac84c07403eeebf8c6'
    '06407d0031c08706177da3007d85c075b9f4ebfd')


def sector(text: bytes = b'', count: int = 0, first: int = 0,
           step: int = 8, more: int = 0, write: bool = False) -> bytes:
    """The sector's 512 bytes.

    :param text: what to print; nothing if empty.
    :param count: how many runs of 4 KiB to read.
    :param first: sector of the first run; `step` sectors on is the next.
    :param more: how many runs to read after the text.
    :param write: write them instead.
    """
    code = CODE.replace(b'\xb4\x42', b'\xb4\x43') if write else CODE
    data = code.ljust(0x100, b'\0') + struct.pack(
        '<HIBBHHHQBH', count, step, 16, 0, 8, 0, 0x1000, first, 0, more)
    return signed(data.ljust(0x140, b'\0') + text)


def glutton() -> bytes:
    """The sector of a guest that writes to its disk for ever.

    ::

        .code16
         cli; xorw %ax,%ax; movw %ax,%ds; movw %ax,%ss; movw $0x7c00,%sp
         sti; movb %dl,drive
        1: movw $0x4300,%ax; movb drive,%dl; movw $dap,%si; int $0x13
         addl $64,dap+8; jmp 1b
        .align 4
        dap: .byte 16,0; .word 64; .word 0,0x1000; .quad 64
        drive: .byte 0
    """
    return signed(bytes.fromhex(
        'fa31c08ed88ed0bc007cfb8816347cb800438a16347cbe247ccd136683062c7c40eb'
        'ec901000400000000010400000000000000000'))


def chatterbox() -> bytes:
    """The sector of a guest that prints for ever.

    ::

        .code16
         movw $0x3f8,%dx; movb $'x',%al
        1: outb %al,%dx; jmp 1b
    """
    return signed(bytes.fromhex('baf803b078eeebfd'))


def ponderer(text: bytes) -> bytes:
    """The sector of a guest that prints a text, then reads for ever.

    4 KiB of the next 64 twice a second, from MiB 1 on.

    ::

        .code16
         cli; xorw %ax,%ax; movw %ax,%ds; movw %ax,%ss; movw $0x7c00,%sp
         sti; cld; movb %dl,drive; movw $text,%si; movw $0x3f8,%dx
        1: lodsb; testb %al,%al; jz 2f; outb %al,%dx; jmp 1b
        2: movw $9,%cx
        3: hlt; loop 3b
         movb $0x42,%ah; movb drive,%dl; movw $dap,%si; int $0x13
         addl $128,dap+8; jmp 2b
        .align 4
        dap: .byte 16,0; .word 8; .word 0,0x1000; .quad 2048
        drive: .byte 0
        text:
    """
    return signed(bytes.fromhex(
        'fa31c08ed88ed0bc007cfbfc88164c7cbe4d7cbaf803ac84c07403eeebf8b90900f4'
        'e2fdb4428a164c7cbe3c7ccd13668106447c80000000ebe466901000080000000010'
        '000800000000000000') + text + b'\0')


def signed(code: bytes) -> bytes:
    """A boot sector with one partition: Glance refuses any without."""
    assert len(code) <= 440
    partition = struct.pack('<8BII', 0x80, 0, 2, 0, 0x83, 0, 3, 0, 1, 7)
    return (code.ljust(446, b'\0') + partition).ljust(510, b'\0') \
        + b'\x55\xaa'


def disk(path: pathlib.Path, size: int, boot: bytes) -> pathlib.Path:
    """A raw disk of `size` bytes that starts with the sector `boot`."""
    with path.open('wb') as image:
        image.write(boot)
        image.truncate(size)
    return path
