# A boot sector that reads its disk through the firmware, and tells on the serial port what it found.
#
# It adds one to the number in sector COUNTER, reads it back from the disk, and reads the sectors from
# FIRST up to LAST. It prints "found NNNNNNNN SSSSSSSS" (the number; the checksum of what it read:
# sum = rol(sum, 1) + dword) or "error AA" (what the firmware said), and powers the machine off.
#
#   as --32 --defsym LAST=8192 boot.s -o boot.o
#   ld -m elf_i386 -Ttext 0x7c00 --oformat binary boot.o -o boot.bin

        .set    COUNTER, 1
        .set    FIRST, 8
        .set    STEP, 64                # sectors at once: half of what a segment holds
        .set    BUFFER, 0x2000          # a segment; what is below belongs to the firmware and to us
        .set    SERIAL, 0x3f8
        .set    POWER, 0x604            # PM1a_CNT, where SeaBIOS puts it

        .code16
        .globl  _start
_start:
        ljmp    $0, $1f
1:      xor     %ax, %ax
        mov     %ax, %ds
        mov     %ax, %ss
        mov     $0x7c00, %sp
        mov     $BUFFER, %ax
        mov     %ax, %es
        cld
        mov     %dl, drive

        call    read
        incl    %es:0
        mov     $0x4300, %ax            # write
        call    transfer
        movl    $0, %es:0
        call    read
        pushl   %es:0

        movl    $FIRST, sector
        movw    $STEP, sectors
        xor     %ebp, %ebp              # the sum
next:   call    read
        xor     %si, %si
        mov     $STEP * 128, %cx
1:      roll    $1, %ebp
        addl    %es:(%si), %ebp
        add     $4, %si
        loop    1b
        addl    $STEP, sector
        cmpl    $LAST, sector
        jb      next

        mov     $found, %si
        call    print
        popl    %eax
        mov     $8, %cx
        call    number
        mov     $space, %si
        call    print
        mov     %ebp, %eax
        mov     $8, %cx
        call    number
off:    mov     $newline, %si
        call    print
        mov     $POWER, %dx
        mov     $0x2000, %ax
        out     %ax, %dx
1:      hlt
        jmp     1b

read:   mov     $0x4200, %ax
transfer:
        mov     drive, %dl
        mov     $packet, %si
        int     $0x13
        jc      1f
        ret
1:      push    %ax
        mov     $error, %si
        call    print
        pop     %ax
        shl     $16, %eax
        mov     $2, %cx
        call    number
        jmp     off

number: roll    $4, %eax                # the first %cx digits of %eax
        push    %ax
        and     $15, %al
        cmp     $10, %al
        sbb     $0x69, %al
        das                             # a digit
        call    put
        pop     %ax
        loop    number
        ret

print:  lodsb
        test    %al, %al
        jz      1f
        call    put
        jmp     print
1:      ret

put:    push    %dx
        push    %ax
        mov     $SERIAL + 5, %dx
1:      in      %dx, %al
        test    $0x20, %al              # room for a byte
        jz      1b
        pop     %ax
        mov     $SERIAL, %dx
        out     %al, %dx
        pop     %dx
        ret

found:  .asciz  "\r\nfound "
error:  .asciz  "\r\nerror "
space:  .asciz  " "
newline: .asciz "\r\n"
drive:  .byte   0

        .balign 4
packet: .byte   16, 0
sectors: .word  1
        .word   0, BUFFER
sector: .long   COUNTER, 0

        .org    510
        .word   0xaa55
