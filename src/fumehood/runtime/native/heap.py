"""Makes forks of a zygote cheap: moves its private memory into a memfd that it then maps privately. Stdlib only.

fork() copies the page tables of anonymous memory, 100 MiB of it for a zygote with pandas, and exit() takes them down
again. It skips private file mappings that were not yet written to (vma_needs_copy(), mm/memory.c): their pages are found
again in the page cache when touched, 16 at a time. Measured here for a sandbox's two forks and exits: 13.4 -> 6.5 ms of
CPU (docs/decisions/0003-heap-in-a-memfd.md). The bytes, the addresses and the copy-on-write stay what they were.

The copy and the remapping must be one step for the interpreter that stands on this memory, so they are 26 instructions
of machine code, entered once, which touch no memory but their table.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

# long move(struct {addr, length, offset, prot} *table, long count, long fd), System V x86-64:
_CODE = bytes.fromhex(
    "5341544155"  # push rbx; push r12; push r13
    "4889fb4989f44989d5"  # rbx = table; r12 = count; r13 = fd
    "4d85e47448"  # next: if (!r12) goto done
    "b8120000004c89ef488b33488b53084c8b53100f05"  # pwrite64(fd, addr, length, offset)
    "483b43087531"  # if (rax != length) goto failed
    "b809000000488b3b488b7308488b531841ba120000004d89e84c8b4b100f05"  # mmap(addr, length, prot, PRIVATE|FIXED, fd, offset)
    "483b03750d"  # if (rax != addr) goto failed
    "4883c32049ffccebb3"  # table++; r12--; goto next
    "31c0eb05"  # done: return 0
    "b801000000"  # failed: return 1
    "415d415c5bc3"  # pop r13; pop r12; pop rbx; ret
)
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r([w-])-p \S+ \S+ \d+\s*(.*)")


def _regions(smaps: str) -> Iterator[tuple[int, int, int]]:
    """(address, length, protection) of each private mapping with pages of its own; stacks and the kernel's own excepted."""
    region = None
    for line in smaps.splitlines():
        if "-" in line.split(" ", 1)[0]:
            region = _REGION.match(line)
        elif region and line.startswith("Anonymous:") and line.split()[1] != "0" and not region[4].startswith(("[stack", "[v")):
            start, end = int(region[1], 16), int(region[2], 16)
            yield start, end - start, mmap.PROT_READ | (mmap.PROT_WRITE if region[3] == "w" else 0)


def move_to_memfd() -> int:
    """Bytes moved. For a single-threaded process only. Raises OSError when refused; the process is whole then, too."""
    if len(os.listdir("/proc/self/task")) != 1:
        raise OSError("this process has threads: the copy would not be one step")
    smaps = Path("/proc/self/smaps").read_text()
    regions = list(_regions(smaps))
    table = ctypes.create_string_buffer(32 * len(regions))
    moved = 0
    for n, (address, length, protection) in enumerate(regions):
        struct.pack_into("=4Q", table, 32 * n, address, length, moved, protection)
        moved += length
    fd = os.memfd_create("fumehood-zygote", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, moved)
        if _enter(table, len(regions), fd):
            raise OSError("the kernel refused to move the heap into a memfd")
    finally:
        os.close(fd)
    return moved


def _enter(table: ctypes.Array[ctypes.c_char], count: int, fd: int) -> int:
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_CODE)
        anchor = ctypes.c_char.from_buffer(page)
        code = ctypes.PYFUNCTYPE(ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long)(ctypes.addressof(anchor))
        result = code(ctypes.addressof(table), count, fd)
        del anchor, code
    return result
