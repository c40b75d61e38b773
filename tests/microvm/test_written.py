"""Which pages of a mapped file were written to is found to the page, and they can be given to another as its own."""

from __future__ import annotations

import mmap
import os
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from fumehood.runtime.microvm import written

PAGE, PAGES = written.PAGE_BYTES, 64
NAME = "memory-of-this-test"
CHOSEN = st.sets(st.integers(0, PAGES - 1))


@contextmanager
def mapped() -> Iterator[tuple[int, mmap.mmap]]:
    """A file of random bytes, and a private mapping of it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory, (Path(directory) / NAME).open("w+b") as file:
        file.write(os.urandom(PAGES * PAGE))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
            yield file.fileno(), memory


def runs(chosen: set[int]) -> bytes:
    found = array("Q")
    for number in sorted(chosen):
        if number - 1 in chosen:
            found[-1] += PAGE
        else:
            found.extend((number * PAGE, PAGE))
    return found.tobytes()


def found() -> bytes:
    return written.pages(os.getpid(), NAME)


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
        assert memory[:] == os.pread(base, PAGES * PAGE, 0)
