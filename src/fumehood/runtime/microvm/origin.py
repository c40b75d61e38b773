"""What machines run from: a snapshot's files, by hard links of our own, so that they stay whatever becomes of the asset."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fumehood.runtime.microvm.assets import Facts, Manifest
from fumehood.runtime.microvm.image import ROOTFS
from fumehood.runtime.microvm.machine import MEMORY, STATE, WRITTEN, MachineSpec

KERNEL, INITRD = "kernel", "initrd"
BASE = (ROOTFS, KERNEL, INITRD, WRITTEN)  # what all machines of a kind share; the last two are not always there


@dataclass(eq=False)
class Origin:
    """`source`: where its BASE files are from, with their digests. `kept`: not removed with the last that runs from it."""

    directory: Path
    facts: Facts
    source: Manifest
    kept: bool = False
    _holders: int = 0

    @property
    def machine(self) -> MachineSpec:
        return machine_in(self.directory, self.facts)

    @contextmanager
    def held(self) -> Generator[None]:
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders and not self.kept:
                shutil.rmtree(self.directory)


def of_asset(snapshot: Manifest, directory: Path, *, kept: bool = False) -> Origin:
    """Raises SetupFailed for one that lacks a file."""
    for file in (STATE, MEMORY, ROOTFS, KERNEL):
        snapshot.path(file)
    directory.mkdir(0o700)
    link({file: snapshot.directory / file for file in snapshot.files}.items(), directory)
    return Origin(directory, snapshot.facts, snapshot, kept)


def link(files: Iterable[tuple[str, Path]], directory: Path) -> None:
    for name, source in files:
        if source.exists():
            os.link(source, directory / name)


def machine_in(directory: Path, facts: Facts) -> MachineSpec:
    initrd = directory / INITRD
    return MachineSpec(
        kernel=directory / KERNEL,
        rootfs=directory / ROOTFS,
        boot_args=facts["boot_args"],
        memory_bytes=facts["memory_bytes"],
        initrd=initrd if initrd.exists() else None,
    )
