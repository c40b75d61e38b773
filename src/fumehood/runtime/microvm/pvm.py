"""What a plain Linux 6.1 lacks as a guest of kvm_pvm, and what takes it too many instructions there: edits of its source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    path: str
    old: str
    new: str


def _at_once(left: str, second: str, seconds: str, then: str) -> tuple[str, str]:
    """The loop that counts the seconds in `left`, and the same after a division that leaves it a few."""
    loop = f"\twhile ({left} >= {second}) {{{then}"
    whole = f"\t\tu64 whole = {left} / {second} - 1;\n\n\t\t{left} -= whole * {second};\n\t\t{seconds} += whole;\n"
    return loop, f"\tif ({left} >= 16 * {second}) {{\n{whole}\t}}\n{loop}"


PVM_EDITS = (
    # int3 in kernel mode is not emulated: the boot's own test of it would be the end.
    Edit("arch/x86/kernel/alternative.c", "\tint3_selftest();\n", ""),
    # fwait is not emulated, and fpu__drop() runs it whenever a process ends.
    Edit("arch/x86/kernel/fpu/core.c", 'asm volatile("1: fwait\\n"', 'asm volatile("1: nop\\n"'),
    # SYSCALL sets RIP to LSTAR, RCX and R11, but leaves CPL 3, so that the first fetch of the entry point is a page fault of
    # user mode at entry_SYSCALL_64. Do the system call from there. A process that jumps there by itself makes a call, no more.
    Edit(
        "arch/x86/mm/fault.c",
        "#include <asm/trace/exceptions.h>",
        "#include <asm/syscall.h>\n#include <asm/proto.h>\n#include <asm/trace/exceptions.h>",
    ),
    Edit(
        "arch/x86/mm/fault.c",
        "\tprefetchw(&current->mm->mmap_lock);\n\n\t/*\n\t * KVM uses #PF vector",
        "\tif (user_mode(regs) && regs->ip == (unsigned long)entry_SYSCALL_64) {\n"
        "\t\tregs->ip = regs->cx;\n"
        "\t\tregs->flags = (regs->r11 & 0x250dd5) | X86_EFLAGS_IF | X86_EFLAGS_FIXED;\n"
        "\t\tregs->orig_ax = regs->ax;\n"
        "\t\tregs->ax = -ENOSYS;\n"
        "\t\tdo_syscall_64(regs, regs->orig_ax);\n"
        "\t\treturn;\n"
        "\t}\n\n"
        "\tprefetchw(&current->mm->mmap_lock);\n\n\t/*\n\t * KVM uses #PF vector",
    ),
    # Its TSC is the host's, so after a restore all that went by since the snapshot comes at once, and is counted in steps of a
    # second: 60 us each, 5 s for a snapshot of yesterday. Count 300 s in a step, as many as its nanoseconds have room for
    # (ntp_error is a difference, right whatever overflows on the way), and their seconds together; leap seconds matter to no
    # one here.
    Edit(
        "kernel/time/timekeeping.c",
        "maxshift = (64 - (ilog2(ntp_tick_length())+1)) - 1;",
        "maxshift = 62 - ilog2(tk->xtime_interval);",
    ),
    Edit("kernel/time/timekeeping.c", *_at_once("tk->tkr_mono.xtime_nsec", "nsecps", "tk->xtime_sec", "\n\t\tint leap;")),
    Edit("kernel/time/timekeeping.c", *_at_once("tk->tkr_raw.xtime_nsec", "snsec_per_sec", "tk->raw_sec", "")),
    # The same time that went by has the neighbour table draw new random times, for which the generator is keyed anew: 20,000
    # instructions, before its new entropy is there. There is no network device, so there are no neighbours.
    Edit("net/core/neighbour.c", "return base ? prandom_u32_max(base) + (base >> 1) : 0;", "return base;"),
    # A restored guest forgets its connections when it hears of that, in a queue of its own. Listen there first: else it accepts
    # the host's first connection, 23,000 instructions, forgets it, and accepts the second.
    Edit(
        "net/vmw_vsock/virtio_transport.c",
        "\tmutex_lock(&vsock->rx_lock);\n\n\tif (!vsock->rx_run)\n\t\tgoto out_nofill;",
        "\tif (work_pending(&vsock->event_work))\n\t\tvirtio_transport_event_work(&vsock->event_work);\n"
        "\tmutex_lock(&vsock->rx_lock);\n\n\tif (!vsock->rx_run)\n\t\tgoto out_nofill;",
    ),
    # A tick is 2500 instructions, 1.3 ms: at 100 Hz an eighth of what a program has. 24 is the least that jiffies.h allows.
    Edit("kernel/Kconfig.hz", "\tdefault 100 if HZ_100\n", "\tdefault 25 if HZ_100\n"),
)
