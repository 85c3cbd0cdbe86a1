# SPDX-License-Identifier: Apache-2.0
# A guest that knows what its disk must hold, and says so; see witness.py.
# Real mode, BIOS calls, the serial console. One sector loads three more.
.code16
.globl _start

.equ COM, 0x3f8
.equ PM_STATUS, 0x600            # where SeaBIOS puts PIIX4's and ICH9's
.equ PM_ENABLE, 0x602
.equ PM_CONTROL, 0x604
.equ PM_BUTTON, 0x100
.equ PM_OFF, 0x2000
.equ TICKS, 0x46c
.equ BUFFER, 0x1000              # segment
.equ PAGE, 4096
.equ RUN, 8                      # pages that are read at once
.equ WRITTEN, 3                  # which of them is written
.equ MAGIC, 0x5357

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
 .word 3
 .word 0x7e00, 0
 .quad 1
drive: .byte 0

.org 510
 .word 0xaa55

# What the disk is like: 32 bytes at 512.
seed: .word 0
rest: .word 0                    # ticks between two runs
first: .long 0                   # page of the first run; the state before it
eager: .word 0                   # runs that every boot reads
lazy: .word 0                    # runs that only servers read
small: .quad 0                   # sectors of a disk that is no server's
large: .quad 0                   # the same, of the largest server's
mask: .word 0                    # bits of a run's number; all 0: a dot

main:
 movw $PM_ENABLE, %dx
 movw $PM_BUTTON, %ax
 outw %ax, %dx
 movw $hello, %si
 call print
 call measure
 call restore
 call survey
 movw $prompt, %si
 call print
work:
 movw at, %ax
 cmpw %ax, limit
 ja 1f
 movw pass, %ax                  # a pass is over
 call print_word
 movw $passed, %si
 call print
 incw pass
 movw $0, at
 call write_state                # before the first page of the new one
1: call read_run
 call expect_old
 cmpb $0, fresh                  # an earlier boot may have written this one
 je 2f
 movb $0, fresh
 call expect_new
 call is_new
 je 2f
 call expect_old
2: call verify_run
 call write_page
 incw at
 call write_state
 call dot
 call tick
 movw rest, %cx
3: jcxz work
 pushw %cx
 call tick
 popw %cx
 decw %cx
 jmp 3b

dot:
 movw mask, %ax
 testw %ax, at
 jnz 1f
 movb $'.', %al
 call print_byte
1: ret

# The number of runs that are read: all on a disk of a server's size.
measure:
 movw eager, %ax
 movw %ax, limit
 movw $0x1e, size
 movw $size, %si
 movb drive, %dl
 movb $0x48, %ah
 int $0x13
 movw $-1, page
 jc failed
 movl size+16, %eax
 cmpl small, %eax
 jbe 1f
 cmpl large, %eax
 ja 1f
 movw lazy, %ax
 addw %ax, limit
1: ret

# Where an earlier boot was.
restore:
 movw $1, pass
 movw $0, at
 movl first, %eax
 decl %eax
 movl %eax, where
 movw $1, count
 movb $0x42, %ah
 call transfer
 movw $BUFFER, %ax
 movw %ax, %es
 cmpw $MAGIC, %es:0
 jne 1f
 movw %es:2, %ax
 movw %ax, pass
 movw %es:4, %ax
 movw %ax, at
1: ret

# Look at everything once, as the last boot must have left it.
survey:
 pushw at
 movw at, %ax
 movw %ax, left
 movw $0, at
1: movw at, %ax
 cmpw %ax, limit
 jbe 2f
 call read_run
 call expect_new
 movw at, %ax
 cmpw left, %ax
 jb 3f
 ja 4f
 call is_new                     # the page of this run may be either
 je 3f
4: call expect_old
3: call verify_run
 incw at
 call dot
 call button
 jmp 1b
2: popw at
 ret

expect_old:
 movw pass, %ax
 decw %ax
 movw %ax, generation
 ret
expect_new:
 movw pass, %ax
 movw %ax, generation
 ret

# The page that belongs to the run `at`; the run into the buffer.
read_run:
 movzwl at, %eax
 shll $3, %eax
 addl first, %eax
 movl %eax, where
 movw $RUN, count
 movb $0x42, %ah
 jmp transfer

# Equal, if the written page of the run is of the generation.
is_new:
 movl where, %eax
 addl $WRITTEN, %eax
 call word_of
 movw $BUFFER, %cx
 movw %cx, %es
 cmpw %es:WRITTEN*PAGE, %ax
 ret

# The word that fills page %eax, in %ax.
word_of:
 pushl %eax
 andb $RUN-1, %al
 movb %al, %bl
 popl %eax
 movw $40503, %cx
 mulw %cx
 addw seed, %ax
 cmpb $WRITTEN, %bl
 jne 1f
 pushw %ax
 movw generation, %ax
 movw $31, %cx
 mulw %cx
 movw %ax, %cx
 popw %ax
 addw %cx, %ax
1: ret

# All pages of the run in the buffer.
verify_run:
 movw $BUFFER, %ax
 movw %ax, %es
 xorw %di, %di
 movw $0, page
1: movzwl page, %eax
 addl where, %eax
 call word_of
 movw $PAGE/2, %cx
 repe scasw
 jne wrong
 incw page
 cmpw $RUN, page
 jb 1b
 ret

wrong:
 movw %ax, expected
 subw $2, %di
 movw %es:(%di), %ax
 movw %ax, found
 movw $bad, %si
 call print
 movw page, %ax
 addw where, %ax
 call print_word
 movw found, %ax
 call print_word
 movw expected, %ax
 call print_word
 jmp halt

# The written page of the run, one generation on.
write_page:
 call expect_new
 movl where, %eax
 addl $WRITTEN, %eax
 movl %eax, where
 call word_of
 call fill
 movw $1, count
 movw $0x4300, %ax
 jmp transfer

write_state:
 movl first, %eax
 decl %eax
 movl %eax, where
 xorw %ax, %ax
 call fill
 movw $MAGIC, %es:0
 movw pass, %ax
 movw %ax, %es:2
 movw at, %ax
 movw %ax, %es:4
 movw $1, count
 movw $0x4300, %ax
 jmp transfer

fill:
 movw $BUFFER, %cx
 movw %cx, %es
 xorw %di, %di
 movw $PAGE/2, %cx
 rep stosw
 ret

# `count` pages at page `where`, by the BIOS call in %ax.
transfer:
 movw %ax, call
 movl where, %eax
 xorl %edx, %edx
 shldl $3, %eax, %edx
 shll $3, %eax
 movl %eax, packet+8
 movl %edx, packet+12
 movw count, %ax
 shlw $3, %ax
 movw %ax, packet+2
 movw $packet, %si
 movb drive, %dl
 movw call, %ax
 int $0x13
 jc failed
 ret

failed:
 movw $error, %si
 call print
 movw where, %ax
 call print_word
halt:
 call tick
 jmp halt

tick:
 movw TICKS, %ax
1: hlt
 cmpw TICKS, %ax
 je 1b
# Off, if somebody pressed the button.
button:
 movw $PM_STATUS, %dx
 inw %dx, %ax
 testw $PM_BUTTON, %ax
 jz 2f
 movw $bye, %si
 call print
 movw $PM_CONTROL, %dx
 movw $PM_OFF, %ax
 outw %ax, %dx
2: ret

print:
 lodsb
 testb %al, %al
 jz 1f
 call print_byte
 jmp print
1: ret

print_word:
 movw $4, %cx
1: rolw $4, %ax
 pushw %ax
 andb $15, %al
 addb $'0', %al
 cmpb $'9', %al
 jbe 2f
 addb $'a'-'0'-10, %al
2: call print_byte
 popw %ax
 loop 1b
 movb $' ', %al
print_byte:
 movw $COM, %dx
 outb %al, %dx
 ret

hello: .asciz "witness\r\nreads its disk,\r\nwrites it, checks it\r\n"
prompt: .asciz "login: "
passed: .asciz "passed\r\n"
bad: .asciz "\r\nBAD "
error: .asciz "\r\nEIO "
bye: .asciz "\r\noff\r\n"

.align 4
packet: .byte 16, 0
 .word 0
 .word 0, BUFFER
 .quad 0
where: .long 0
count: .word 0
call: .word 0
pass: .word 0
at: .word 0
left: .word 0
limit: .word 0
generation: .word 0
page: .word 0
expected: .word 0
found: .word 0
fresh: .byte 1
size: .word 0x1e
.org 2048
