"""What a virtual machine monitor is to the tier: it boots a machine, or restores one, in a place that is that machine's own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

STATE, MEMORY = "state", "memory"  # the files of a snapshot
WRITTEN = "written"  # what Machine.written() said of another that went on from it; not always there
CHANNEL = "channel"  # the Unix socket in a machine's directory that leads to the agent


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A machine as it boots. Paths are the host's; none of them is written to."""

    kernel: Path
    rootfs: Path
    boot_args: str
    memory_bytes: int
    initrd: Path | None = None
    vcpus: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """What a machine has of this host. `directory` is empty, its own, owned by `uid`, on the file system of the assets (hard
    links), and its path is short: a Unix socket's has 107 bytes. `uid` None: the supervisor is an ordinary user.

    `doors`: files of control groups, into each of which the monitor writes 0 before it does anything. `*_bps`: of the disk; 0 =
    no limit.
    """

    id: str
    directory: Path
    uid: int | None = None
    doors: tuple[str, ...] = ()
    read_bps: int = 0


class Machine(Protocol):
    """One that runs, until aclose(). After each method that raises, aclose() is still to be called."""

    @property
    def pid(self) -> int: ...
    @property
    def pidfd(self) -> int:
        """-1 once it is closed."""
        ...

    def said(self) -> str:
        """The end of its console: hostile text (H16)."""
        ...

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the agent; our HELLO is said, and its own is the next to be read. Waits for it as long as the machine lives.

        Raises SandboxGone, with the console's last words.
        """
        ...

    async def pause(self) -> None: ...
    async def resume(self) -> None: ...

    async def snapshot(self, directory: Path) -> None:
        """Of a paused machine: STATE and MEMORY, readable by every uid, into `directory`, which only the supervisor can enter.
        The machine goes on as it was, paused. Raises CapacityExceeded when the disk is full.
        """
        ...

    def written(self) -> bytes:
        """Which pages of its memory it has written to since it went on, for WRITTEN; empty where that would save nothing."""
        ...

    async def aclose(self) -> None:
        """Ends it, waits for that, and removes from its directory what it put there."""
        ...


class Vmm(Protocol):
    """Stateless. `name` is the tier's."""

    name: str

    async def version(self) -> str:
        """Of the binary. Raises ProtectionUnavailable when there is none, or one with a known way out of it (H3)."""
        ...

    async def boot(self, spec: MachineSpec, place: Place) -> Machine:
        """Its kernel runs. Raises SetupFailed, and leaves nothing."""
        ...

    async def restore(self, spec: MachineSpec, snapshot: Path, place: Place) -> Machine:
        """Goes on from `snapshot`, a directory with STATE, MEMORY and perhaps WRITTEN, which a machine of the same `spec` made:
        copy on write, so any number may. Raises SetupFailed, and leaves nothing.
        """
        ...
