"""Boots the lane's guest under QEMU and reads its report."""

from __future__ import annotations

import re
import subprocess
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machines import tsc_khz

from fumehood.runtime.microvm.assets import Manifest
from lane import disks
from lane.init import END

_MEMORY_MIB, _CPUS = 2048, 2
_SHOWN_CHARACTERS = 4000
_RUN = re.compile(rb"\n=== lane: run (\w+) (-?\d+) (\d+)\n")


@dataclass(frozen=True)
class Ran:
    """One run of pytest in there. `bad`: what failed, with its message; `skipped`: with its reason."""

    exit_code: int
    output: str
    times_s: dict[str, float]
    bad: dict[str, str]
    skipped: dict[str, str]

    @property
    def passed(self) -> int:
        return len(self.times_s) - len(self.bad) - len(self.skipped)

    @property
    def summary(self) -> str:
        """The end of what pytest said, short enough to be read."""
        return f"exit code {self.exit_code}, {self.passed} passed\n...{self.output[-_SHOWN_CHARACTERS:]}"


def boot(kernel: Manifest, root: Path, directory: Path, runs: Sequence[dict[str, Any]], limit_s: float) -> dict[str, Ran]:
    """Until its report is whole. What of it there is when `limit_s` has passed, or the machine has ended, is all there is."""
    disks.checkout(directory / "checkout.ext4", {"clock_s": time.time(), "runs": list(runs)})
    disks.scratch(directory / "scratch.ext4")
    report, deadline = directory / "report", time.monotonic() + limit_s
    report.write_bytes(b"")
    with (directory / "vmm.log").open("wb") as log:
        process = subprocess.Popen(_command(kernel, root), cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        while process.poll() is None and time.monotonic() < deadline and not _ended(report):
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()
    return _read(report.read_bytes()) | ({} if _ended(report) else {"": _unfinished(directory)})


def _command(kernel: Manifest, root: Path) -> list[str]:
    """Two processors of QEMU's: Linux distrusts their TSCs and counts ticks. So where the host has no time for the machine, its
    clock stands still, and deadlines in it are about its own work.
    """
    boot_args = f"{kernel.facts['boot_args']} tsc_early_khz={tsc_khz()}"
    command = ["qemu-system-x86_64", "-M", f"microvm,acpi={'on' if kernel.facts['acpi'] else 'off'}", "-cpu", "max"]
    command += ["-accel", "tcg,thread=multi", "-m", str(_MEMORY_MIB), "-smp", str(_CPUS), "-serial", "file:console.log"]
    command += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-sandbox", "on"]
    command += ["-kernel", str(kernel.path("bzImage")), "-append", boot_args]
    command += ["-initrd", str(kernel.path("initrd"))] if "initrd" in kernel.files else []
    for name, file, more in (
        ("root", root, "readonly=on"),
        ("checkout", "checkout.ext4", "readonly=on"),
        ("scratch", "scratch.ext4", "cache=unsafe"),
    ):
        command += ["-drive", f"id={name},file={file},format=raw,if=none,{more}"]
        command += ["-device", f"virtio-blk-device,drive={name},serial={name}"]
    command += ["-device", "virtio-serial-device", "-chardev", "file,id=report,path=report"]
    return [*command, "-device", "virtserialport,chardev=report,name=lane.report"]


def _ended(report: Path) -> bool:
    return report.read_bytes().rstrip().endswith(END.encode())


def _read(report: bytes) -> dict[str, Ran]:
    """Each run: what pytest said, a line with its exit code and the length of the JUnit file, that file."""
    found: dict[str, Ran] = {}
    at = 0
    while head := _RUN.search(report, at):
        length = int(head[3])
        results = report[head.end() : head.end() + length]
        found[head[1].decode()] = _ran(int(head[2]), report[at : head.start()].decode(errors="replace"), results)
        at = head.end() + length
    return found


def _ran(exit_code: int, output: str, results: bytes) -> Ran:
    times: dict[str, float] = {}
    bad: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for case in ET.fromstring(results).iter("testcase") if results else ():
        name = f"{case.get('classname')}::{case.get('name')}"
        times[name] = float(case.get("time", "0"))
        for outcome in case:
            if outcome.tag in ("failure", "error"):
                bad[name] = outcome.get("message", "")
            elif outcome.tag == "skipped":
                skipped[name] = outcome.get("message", "")
    return Ran(exit_code, output, times, bad, skipped)


def _unfinished(directory: Path) -> Ran:
    """Cut off: the end of all that the machine said."""
    said = "".join((directory / name).read_text(errors="replace")[-_SHOWN_CHARACTERS:] for name in ("console.log", "report"))
    return Ran(-1, said, {}, {}, {})
