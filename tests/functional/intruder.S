# SPDX-License-Identifier: Apache-2.0
# A guest that sends frames and tells what comes back; see intruder.py.
# Real mode, BIOS calls, a legacy virtio-net card, the serial console.
.code16
.globl _start

.equ COM, 0x3f8
.equ TICKS, 0x46c
.equ SECTORS, 23
.equ RX, 0x2000                  # segments of the two queues
.equ TX, 0x2400
.equ BUFFERS, 0x4000             # segment of what is received
.equ BUFFER, 2048
.equ COUNT, 16                   # buffers
.equ AVAIL, 4096                 # offsets in a queue of 256
.equ USED, 8192
.equ HEADER, 10                  # bytes of virtio-net before each frame

_start:
 cli
 xorw %ax, %ax
 movw %ax, %ds
 movw %ax, %es
 movw %ax, %ss
 movw $0x7c00, %sp
 sti
 cld
 movb %dl, drive
 movw $0x4200, %ax
 movw $loader, %si
 int $0x13
 jc .
 jmp main

.align 4
loader: .byte 16, 0
 .word SECTORS
 .word 0x7e00, 0
 .quad 1
drive: .byte 0

.org 510
 .word 0xaa55

main:
 movw $0xb102, %ax               # PCI BIOS: find the card
 movw $0x1000, %cx
 movw $0x1af4, %dx
 xorw %si, %si
 int $0x1a
 jc fail
 movw $4, %di                    # ports and bus mastering
 movw $0xb10a, %ax
 int $0x1a
 andl $0xffff, %ecx
 orl $7, %ecx
 movw $0xb10d, %ax
 int $0x1a
 movw $0x10, %di
 movw $0xb10a, %ax
 int $0x1a
 andw $0xfffc, %cx
 movw %cx, ports

 movw $RX, %ax
 movw %ax, %es
 xorw %di, %di
 xorw %ax, %ax
 movw $0x4000, %cx
 rep stosw

 movb $0, %al
 call status
 movb $3, %al
 call status
 movw ports, %dx
 addw $4, %dx
 xorl %eax, %eax                 # no features
 outl %eax, %dx
 xorw %ax, %ax
 movl $(RX >> 8), %ebx
 call queue
 movw $1, %ax
 movl $(TX >> 8), %ebx
 call queue
 movb $7, %al
 call status

 movw $RX, %ax
 movw %ax, %es
 xorw %di, %di
 movl $(BUFFERS << 4), %ebx
 xorw %cx, %cx
1:
 movl %ebx, %es:(%di)
 movl $BUFFER, %es:8(%di)
 movw $2, %es:12(%di)            # to be written
 movw %cx, %si
 addw %si, %si
 movw %cx, %es:AVAIL+4(%si)
 addw $16, %di
 addl $BUFFER, %ebx
 incw %cx
 cmpw $COUNT, %cx
 jb 1b
 movw %cx, %es:AVAIL+2
 movw %cx, given
 xorw %ax, %ax
 call notify

 movw frames, %cx
 movw $frames + 2, %si
send:
 pushw %cx
 xorl %eax, %eax
 lodsw
 movzwl %si, %ebx
 addw %ax, %si
 pushw %si
 movw $TX, %dx
 movw %dx, %es
 movw sent, %di                  # of each frame its own: a link that leads
 shlw $4, %di                    # nowhere never takes one
 movl %ebx, %es:(%di)
 movl %eax, %es:8(%di)
 movw sent, %di
 movw %di, %ax
 addw %di, %di
 movw %ax, %es:AVAIL+4(%di)
 incw %ax
 movw %ax, sent
 movw %ax, %es:AVAIL+2
 movw $1, %ax
 call notify
 movw $1, %cx
 call linger
 popw %si
 popw %cx
 loop send
 movw $9, %cx
 call linger
 movw $done, %si
 jmp say
fail:
 movw $failed, %si
say:
 lodsb
 testb %al, %al
 jz stop
 call put
 jmp say
stop:
 hlt
 jmp stop

# Receive for %cx ticks of 55 ms.
linger:
 movw TICKS, %bp
1:
 call receive
 movw TICKS, %ax
 subw %bp, %ax
 cmpw %cx, %ax
 jb 1b
 ret

# Tell all frames that came, and give their buffers back.
receive:
 pushw %es
 pushaw
 movw $RX, %ax
 movw %ax, %es
1:
 movw taken, %di
 cmpw %es:USED+2, %di
 je 3f
 incw taken
 andw $255, %di
 shlw $3, %di
 movw %es:USED+4(%di), %si
 movw %es:USED+8(%di), %cx
 pushw %si
 shlw $11, %si                   # BUFFER
 addw $HEADER, %si
 subw $HEADER, %cx
 movb $'<', %al
 call put
 pushw %ds
 movw $BUFFERS, %ax
 movw %ax, %ds
2:
 lodsb
 call hex
 loop 2b
 popw %ds
 movb $'>', %al
 call put
 popw %si
 movw given, %di
 incw given
 andw $255, %di
 addw %di, %di
 movw %si, %es:AVAIL+4(%di)
 movw given, %ax
 movw %ax, %es:AVAIL+2
 xorw %ax, %ax
 call notify
 jmp 1b
3:
 popaw
 popw %es
 ret

hex:
 pushw %ax
 shrb $4, %al
 call digit
 popw %ax
 andb $15, %al
digit:
 cmpb $10, %al
 sbbb $0x69, %al
 das
put:
 pushw %dx
 movw $COM, %dx
 outb %al, %dx
 popw %dx
 ret

# %al becomes the state of the device.
status:
 movw ports, %dx
 addw $0x12, %dx
 outb %al, %dx
 ret

# Queue %ax lies in page %ebx.
queue:
 movw ports, %dx
 addw $0x0e, %dx
 outw %ax, %dx
 subw $2, %dx
 inw %dx, %ax
 cmpw $256, %ax
 jne fail
 subw $4, %dx
 movl %ebx, %eax
 outl %eax, %dx
 ret

# Queue %ax has something.
notify:
 movw ports, %dx
 addw $0x10, %dx
 outw %ax, %dx
 ret

ports: .word 0
sent: .word 0
given: .word 0
taken: .word 0
done: .asciz "\r\ntest login: "
failed: .asciz "no card"

# How many, then of each its length and its bytes.
.align 16
frames: .word 0
