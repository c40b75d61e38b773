"""What a machine renews for its user: clones of one snapshot must not share the time or random numbers (H20)."""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import functools
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from .loop import Refused

RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207
MAX_ENTROPY_BYTES = 512
_SEED_BYTES = 32
# By itself `random` takes 2500 bytes, which an emulated kernel is 40 ms about. tempfile has one of its own.
_SEEDS: Mapping[str, Callable[[Any], object]] = {
    "random": lambda random: random.seed(os.urandom(_SEED_BYTES)),
    "numpy.random": lambda numpy_random: numpy_random.seed(),
    "ssl": lambda ssl: ssl.RAND_add(os.urandom(_SEED_BYTES), float(_SEED_BYTES)),
    "tempfile": lambda tempfile: setattr(tempfile, "_name_sequence", None),
}


def renew(clock_s: float | None, entropy: str, hostname: str) -> None:
    """Only what is given. Raises Refused: "unsupported" where all of it is the host's, as in a sandbox that is no machine."""
    seed = _seed(entropy)
    try:
        if clock_s is not None:
            time.clock_settime(time.CLOCK_REALTIME, clock_s)
        if seed:
            _reseed(seed)
        if hostname:
            socket.sethostname(hostname)
    except PermissionError as e:
        raise Refused("unsupported", f"clock, entropy and host name are the host's in this tier: {e}", "EPERM") from None


def _seed(entropy: str) -> bytes:
    try:
        seed = base64.b64decode(entropy, validate=True)
    except binascii.Error as e:
        raise Refused("invalid", f"'entropy' is not base64: {e}") from None
    if len(seed) > MAX_ENTROPY_BYTES:
        raise Refused("invalid", f"'entropy' is over {MAX_ENTROPY_BYTES} bytes")
    return seed


def _reseed(seed: bytes) -> None:
    """Adding is not enough: the generator takes from its pool once a minute, unless it is told to now (random(4))."""
    fcntl.ioctl(_device(), RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
    fcntl.ioctl(_device(), RNDRESEEDCRNG)


@functools.cache
def _device() -> int:
    return os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)


def reseed() -> None:
    """What os.fork() does for `random`, after a machine was cloned and no process saw a fork."""
    for name, seed in _SEEDS.items():
        with contextlib.suppress(Exception):  # user code may have put anything there
            seed(sys.modules[name])
