"""Pages that every machine of a kind writes to before its first answer: where KVM is emulated such a page costs 4 us copied
before the guest runs, and 30 us when the guest writes to it (docs/decisions/0009).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Documentation/admin-guide/mm/pagemap.rst: in memory; a page of the file's, so not written to.
_PRESENT, _OF_FILE = 1 << 63, 1 << 61
_MOST_MAPPINGS = 4  # a machine of more than 3 GiB has two, around its devices

Mapping = tuple[int, int, int]  # start, end, offset in the file


def pages(pid: int, memory: str) -> frozenset[int]:
    """Of the file `memory`, which `pid` has mapped privately, the offsets of the pages that it has written to."""
    found = set[int]()
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for start, end, offset in _mappings(pid, memory):
            entries = array("Q", os.pread(pagemap.fileno(), (end - start) // PAGE_BYTES * 8, start // PAGE_BYTES * 8))
            own = (number for number, entry in enumerate(entries) if entry & _PRESENT and not entry & _OF_FILE)
            found.update(offset + number * PAGE_BYTES for number in own)
    return frozenset(found)


def runs(offsets: Iterable[int]) -> bytes:
    """The same as a file keeps it: offset and length of what lies together, as u64."""
    found = array("Q")
    for offset in sorted(offsets):
        if found and found[-2] + found[-1] == offset:
            found[-1] += PAGE_BYTES
        else:
            found.extend((offset, PAGE_BYTES))
    return found.tobytes()


def copy(pid: int, memory: str, base: int, runs: bytes) -> None:
    """Gives `pid`, whose guest does not run yet, copies of its own of those pages of `base`, and writes nowhere else.

    Raises OSError; ValueError for runs that are none, and where `base` is not mapped once and whole: a snapshot's state may be
    one that took its monitor over.
    """
    numbers, mappings = array("Q", runs), _mappings(pid, memory)
    if sum(end - start for start, end, _ in mappings) != os.fstat(base).st_size or len(mappings) > _MOST_MAPPINGS:
        raise ValueError(f"{memory} is not mapped as a machine's memory is")
    with open(f"/proc/{pid}/mem", "wb", buffering=0) as own:
        for at, length in zip(numbers[::2], numbers[1::2], strict=True):
            for start, end, offset in mappings:
                first, last = max(at, offset), min(at + length, offset + end - start)
                if first < last:
                    os.pwrite(own.fileno(), os.pread(base, last - first, first), start + first - offset)


def _mappings(pid: int, memory: str) -> list[Mapping]:
    found = list[Mapping]()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, offset, _, _, *path = line.split(maxsplit=5)
        if access == "rw-p" and path and path[0].endswith(f"/{memory}"):
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16), int(offset, 16)))
    return found
