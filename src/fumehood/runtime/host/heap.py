"""This process's own memory."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """To the kernel, what was freed. glibc keeps every hole that is not at the heap's top: after 8,000 runs 1.6 MiB of them,
    which no object of ours held. It takes 5 ms for a heap of 30 MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
