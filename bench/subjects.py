"""What is measured: a Subject does one snippet once and says how long it took. The snippets, and the peers."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench import bundle

SNIPPETS = {
    "print": "print(1)",
    "pandas": 'import pandas as pd; print(pd.DataFrame({"a": range(100)}).describe())',
}
_EXPECTED = {"print": "1\n", "pandas": "count  100.000000"}
_PACKAGES = {"bwrap": "bubblewrap", "crun": "crun", "runc": "runc", "runsc": "runsc"}
_TIMEOUT_S = 60.0
_numbers = itertools.count()


class Wrong(Exception):
    """The subject ran, but its answer is not the snippet's, so its time counts for nothing."""


@dataclass(frozen=True)
class Subject:
    """`once(snippet name)` gives milliseconds by metric; "" is the whole of it. Raises Wrong or what the subject raises."""

    name: str
    what: str
    once: Callable[[str], Mapping[str, float]]


def check(snippet: str, output: str) -> None:
    if _EXPECTED[snippet] not in output:
        raise Wrong(f"answered {output[-200:]!r}")


def timed(snippet: str, argv: list[str], cwd: Path | None = None) -> dict[str, float]:
    """Wall time of a program from spawn to exit, with its answer checked."""
    started = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, cwd=cwd, check=False)
    took_ms = (time.perf_counter() - started) * 1e3
    if done.returncode:
        raise Wrong(f"exit code {done.returncode}: {(done.stderr or done.stdout)[-300:]}")
    check(snippet, done.stdout)
    return {"": took_ms}


def install() -> None:
    """Root only: fetch the peers that this host lacks. One that can't be had is reported as absent later."""
    missing = [package for program, package in _PACKAGES.items() if shutil.which(program) is None]
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        for package in missing:  # one by one, so that an unknown one does not cost the others
            command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
            subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, check=False)


def peers(scratch: Path) -> tuple[list[Subject], dict[str, str]]:
    """(those that run here, why each other one does not). A peer is tried once, and absent when that try fails."""
    candidates = [
        Subject("python", "plain `python3 -c`, no isolation", lambda s: timed(s, [sys.executable, "-c", SNIPPETS[s]])),
        Subject("bwrap", "bubblewrap, read-only binds, `--unshare-all`", lambda s: timed(s, [*_bwrap(), SNIPPETS[s]])),
        Subject("crun", "`crun run`, OCI bundle of the same binds", _oci(scratch, crun(), "crun")),
        Subject("runc", "`runc run`, the same bundle", _oci(scratch, ["runc"], "runc")),
        Subject("runsc", "`runsc run` (gVisor), the same bundle", _oci(scratch, _runsc(scratch), "runsc")),
    ]
    absent: dict[str, str] = {}
    for subject in candidates:
        try:
            subject.once("print")
        except (Wrong, OSError, subprocess.TimeoutExpired) as e:
            absent[subject.name] = "not installed" if isinstance(e, FileNotFoundError) else str(e)[-400:]
    return [s for s in candidates if s.name not in absent], absent


def _bwrap() -> list[str]:
    directories, links = bundle.system_entries()
    binds = [word for d in (*directories, *bundle.python_prefixes()) for word in ("--ro-bind", d, d)]
    symlinks = [word for link, to in links.items() for word in ("--symlink", to, link)]
    rest = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--unshare-all", "--die-with-parent", "--clearenv"]
    return ["bwrap", *binds, *symlinks, *rest, sys.executable, "-c"]


def crun() -> list[str]:
    """crun 1.8 refuses a host with hybrid cgroups, used or not, so there it runs where the v2 part is not mounted.

    That costs it about 3 ms. It makes no cgroups here, as bwrap and runsc.
    """
    unified = Path("/sys/fs/cgroup/unified")
    hybrid = unified.is_dir() and (unified / "cgroup.controllers").read_text().strip()
    enter = ["unshare", "-m", "sh", "-c", f'umount {unified} && exec "$@"', "sh"] if hybrid and os.geteuid() == 0 else []
    return [*enter, "crun", "--cgroup-manager=disabled"]


def _runsc(scratch: Path) -> list[str]:
    # As crun and bwrap: no cgroups.
    return ["runsc", "--network=none", "--ignore-cgroups", f"--root={scratch}/runsc"]


def _oci(scratch: Path, command: list[str], name: str) -> Callable[[str], dict[str, float]]:
    # gVisor's Sentry is the user namespace of what it runs; mapping host ids is the runtimes' own affair there.
    namespaces = ("pid", "network", "ipc", "uts", "mount") if name == "runsc" else None

    def once(snippet: str) -> dict[str, float]:
        argv = [sys.executable, "-c", SNIPPETS[snippet]]
        where = bundle.write(scratch / f"{name}-{snippet}", argv, *([namespaces] if namespaces else []))
        return timed(snippet, [*command, "run", f"bench-{os.getpid()}-{next(_numbers)}"], where)

    return once
