"""Which pages of a mapped file were written to is found to the page, and they can be given to another as its own."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fumehood.runtime.microvm import written

PAGE, PAGES = written.PAGE_BYTES, 64
NAME = "memory-of-this-test"
RW, MAP_FIXED = mmap.PROT_READ | mmap.PROT_WRITE, 0x10
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
CHOSEN = st.sets(st.integers(0, PAGES - 1))


@contextmanager
def mapped(*, apart: bool = False) -> Iterator[tuple[int, bytearray]]:
    """A file of random bytes, and a private mapping of it; `apart`: in two halves, with a page of somebody else's between."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, (Path(directory) / NAME).open("w+b") as file:
        file.write(os.urandom(PAGES * PAGE))
        file.flush()
        with mapping(file.fileno(), (PAGES // 2, PAGES // 2) if apart else (PAGES,)) as memory:
            yield file.fileno(), memory


@contextmanager
def mapping(fd: int, parts: tuple[int, ...]) -> Iterator[Any]:
    """The parts of the file and a page of zeros behind each, in one piece of memory."""
    size = (sum(parts) + len(parts)) * PAGE
    whole = libc.mmap(None, size, RW, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    at, offset = whole, 0
    for part in parts:
        assert libc.mmap(at, part * PAGE, RW, mmap.MAP_PRIVATE | MAP_FIXED, fd, offset) == at
        at, offset = at + (part + 1) * PAGE, offset + part * PAGE
    try:
        yield (ctypes.c_ubyte * size).from_address(whole)
    finally:
        libc.munmap(whole, size)


def found() -> bytes:
    return written.runs(written.pages(os.getpid(), NAME))


def runs(chosen: Iterable[int]) -> bytes:
    return written.runs(number * PAGE for number in chosen)


def test_what_lies_together_is_one_run() -> None:
    assert array("Q", runs({7, 1, 2, 3, 9})).tolist() == [PAGE, 3 * PAGE, 7 * PAGE, PAGE, 9 * PAGE, PAGE]


@given(CHOSEN, CHOSEN)
@example(set(range(PAGES)), set())
def test_what_was_written_to_is_found_and_what_was_read_is_not(wrote: set[int], read: set[int]) -> None:
    with mapped() as (_, memory):
        for number in read:
            _ = memory[number * PAGE]
        for number in wrote:
            memory[number * PAGE] ^= 1
        assert found() == runs(wrote)


@given(CHOSEN)
@example(set(range(PAGES)))
def test_who_is_given_pages_has_copies_of_his_own_with_the_same_bytes(chosen: set[int]) -> None:
    with mapped() as (base, memory):
        written.copy(os.getpid(), NAME, base, runs(chosen))
        assert found() == runs(chosen)
        assert bytes(memory[: PAGES * PAGE]) == os.pread(base, PAGES * PAGE, 0)


@pytest.mark.parametrize("most", [[0, PAGES * PAGE], [0, 1 << 62], [PAGE, (1 << 64) - 1], [1 << 63, 1 << 63], [5, 3 * PAGE]])
def test_nothing_is_written_beside_the_memory_whatever_the_runs_are(most: list[int]) -> None:
    """The last bytes of a run may be a tenant's, and root writes them."""
    with mapped(apart=True) as (base, memory):
        written.copy(os.getpid(), NAME, base, array("Q", most).tobytes())
        half, content = PAGES // 2 * PAGE, os.pread(base, PAGES * PAGE, 0)
        assert bytes(memory) == content[:half] + bytes(PAGE) + content[half:] + bytes(PAGE)


@pytest.mark.parametrize("numbers", [[0], [0, PAGE, PAGE]])
def test_runs_that_are_none_are_refused(numbers: list[int]) -> None:
    with mapped() as (base, _), pytest.raises(ValueError, match="zip"):
        written.copy(os.getpid(), NAME, base, array("Q", numbers).tobytes())


@pytest.mark.parametrize("parts", [(PAGES // 2,), (PAGES, 1), (8,) * 8])
def test_a_file_that_is_not_mapped_once_and_whole_is_not_written_through(parts: tuple[int, ...]) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, (Path(directory) / NAME).open("w+b") as file:
        file.truncate(PAGES * PAGE)
        with mapping(file.fileno(), parts), pytest.raises(ValueError, match="not mapped"):
            written.copy(os.getpid(), NAME, file.fileno(), runs({0}))
        assert not found()
