"""What a monitor that its guest took over can leave in its directory, write and say costs the host nothing that stays (H16)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fumehood.config import Config
from fumehood.model import MIB, Limits
from fumehood.runtime.microvm import sparse
from fumehood.runtime.microvm.assets import Assets
from fumehood.runtime.microvm.driver import MicrovmHandle, Speed
from fumehood.runtime.microvm.machine import Place
from fumehood.runtime.microvm.places import Places
from fumehood.runtime.microvm.process import Monitor
from http_server import clean_env

pytestmark = pytest.mark.rootless

DEEPER = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w')"  # than Python recurses


@pytest.fixture
def config(tmp_path: Path) -> Config:
    for name in ("state", "run"):
        (tmp_path / name).mkdir(mode=0o700)
    return replace(Config.load(clean_env()), state_dir=tmp_path / "state", run_dir=tmp_path / "run")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not pytest's, which would remove what a failing test has left as shutil does, and fail too."""
    directory = tempfile.mkdtemp(prefix="taken-over-", dir="/var/tmp")
    yield Path(directory)
    subprocess.run(["rm", "-r", directory], check=True)


def dig(directory: Path) -> None:
    subprocess.run([sys.executable, "-c", DEEPER], cwd=directory, check=True)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"it goes on after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def test_directories_as_deep_as_a_monitor_likes_go_with_its_place(config: Config) -> None:
    places = Places(config)
    try:
        async with places.taken(256 * MIB, Limits()) as (place, _):
            dig(place.directory)
        assert not place.directory.exists()
    finally:
        places.aclose()


async def test_directories_as_deep_as_a_monitor_likes_do_not_keep_the_next_supervisor_from_its_start(config: Config) -> None:
    left = config.state_dir / "microvm/machines/dead/v1"
    left.mkdir(parents=True)
    dig(left)
    Places(config).aclose()
    assert not left.exists()


def test_directories_that_a_template_dug_keep_nobody_from_the_next_snapshot(config: Config) -> None:
    assets = Assets(config.state_dir)

    def fails(made: Path) -> dict[str, Any]:
        dig(made)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        assets.publish("snapshots", "one", fails)
    assert not list((config.state_dir / "microvm/snapshots").iterdir())
    assets.publish("snapshots", "two", lambda _: {})


def test_a_memory_file_that_gets_shorter_while_it_is_read_ends_the_reading() -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file, within(10):
        fd = file.fileno()
        os.pwrite(fd, bytes(sparse.BLOCK_BYTES) + b"1" * sparse.BLOCK_BYTES + bytes(2 * sparse.BLOCK_BYTES), 0)
        zeros = sparse._zeros(fd)
        assert next(zeros) == (0, sparse.BLOCK_BYTES)
        os.ftruncate(fd, 0)
        with pytest.raises(OSError, match="shorter"):
            list(zeros)


async def test_a_monitor_can_make_no_file_larger_than_its_machine_s_memory(tmp_path: Path) -> None:
    """Else the digest of a snapshot that it made as long as the file system allows is never done."""
    script = "exec 2>&1; truncate -s 256M memory && echo made; truncate -s 257M memory || echo refused"
    monitor = Monitor.start(("sh", "-c", script), Place("v1", tmp_path), file_bytes=256 * MIB)
    await monitor.ended()
    await monitor.aclose()
    assert "made" in monitor.said()
    assert (tmp_path / "memory").stat().st_size == 256 * MIB, monitor.said()


def test_what_a_guest_tells_of_its_account_takes_no_more_room_however_often_it_tells_it() -> None:
    handle = MicrovmHandle("s1", cast(Any, None), cast(Any, None), cast(Any, None), (), Speed())
    tracemalloc.start()
    try:
        for told in range(50):
            handle.told({"type": "account", "disk_full": "x" * 1000, **{f"{told}-{n}": n for n in range(1000)}})
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    handle.told({"disk_full": True, "disk_used_bytes": 7})
    assert handle.disk_is_full() and handle.disk_used_bytes() == 7
