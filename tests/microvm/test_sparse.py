"""Files of a guest's memory are copied to the byte, and take no room for what is zero."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fumehood.runtime.microvm import sparse

PAGE = 4096
BLOCK = sparse.BLOCK_BYTES
# What lies where: (page, pages, byte). A byte of 0 is written, so that it takes room.
WRITES = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40), st.integers(0, 2)), max_size=8)


@contextmanager
def file() -> Iterator[int]:
    with tempfile.TemporaryFile(dir="/var/tmp") as made:
        yield made.fileno()


def filled(fd: int, size: int, writes: list[tuple[int, int, int]]) -> bytes:
    os.ftruncate(fd, size)
    for page, pages, byte in writes:
        data = bytes([byte]) * (pages * PAGE)
        os.pwrite(fd, data[: max(0, size - page * PAGE)], page * PAGE)
    return content(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def room(fd: int) -> int:
    os.fsync(fd)
    return os.fstat(fd).st_blocks * 512


@given(WRITES, st.integers(0, 140).map(lambda pages: pages * PAGE))
@example([], 0)
@example([], 64 * PAGE)
@example([(0, 40, 1)], 40 * PAGE + 1)
def test_a_copy_has_the_same_bytes_and_takes_no_more_room(writes: list[tuple[int, int, int]], size: int) -> None:
    with file() as source, file() as target:
        expected = filled(source, size, writes)
        sparse.copy(source, target)
        assert content(target) == expected
        assert room(target) <= room(source)


@given(WRITES, st.integers(0, 140).map(lambda pages: pages * PAGE))
@example([(0, 40, 0)], 33 * PAGE)
def test_punching_changes_no_byte_and_leaves_no_block_of_zeros_that_takes_room(
    writes: list[tuple[int, int, int]], size: int
) -> None:
    with file() as fd:
        expected = filled(fd, size, writes)
        sparse.punch(fd)
        assert content(fd) == expected
        used = sum(any(expected[start : start + BLOCK]) for start in range(0, size, BLOCK))
        assert room(fd) <= used * BLOCK


@given(WRITES, WRITES)
def test_what_is_written_over_a_copy_is_there_with_the_rest_and_the_original_is_as_it_was(
    base: list[tuple[int, int, int]], changes: list[tuple[int, int, int]]
) -> None:
    """So Firecracker makes a whole snapshot of a difference."""
    with file() as source, file() as target:
        before = filled(source, 140 * PAGE, base)
        sparse.copy(source, target)
        after = bytearray(before)
        for page, pages, byte in changes:
            os.pwrite(target, bytes([byte]) * (pages * PAGE), page * PAGE)
            after[page * PAGE : (page + pages) * PAGE] = bytes([byte]) * (pages * PAGE)
        assert content(target) == bytes(after)
        assert content(source) == before


def test_a_file_without_data_has_no_extents_and_one_with_some_has_them_in_order() -> None:
    with file() as fd:
        os.ftruncate(fd, 100 * BLOCK)
        assert list(sparse.extents(fd)) == []
        for block in (3, 50, 99):
            os.pwrite(fd, b"x" * BLOCK, block * BLOCK)
        assert list(sparse.extents(fd)) == [(b * BLOCK, (b + 1) * BLOCK) for b in (3, 50, 99)]


def test_a_copy_into_what_is_not_writable_is_an_error() -> None:
    with file() as source:
        os.pwrite(source, b"x", 0)
        target = os.open("/proc/self/exe", os.O_RDONLY)
        try:
            with pytest.raises(OSError, match=r"."):
                sparse.copy(source, target)
        finally:
            os.close(target)
