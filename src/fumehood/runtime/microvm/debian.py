"""Debian packages, fetched and unpacked as an ordinary user: no script of theirs is run. apt checks their signatures."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fumehood.errors import SetupFailed

_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")
_KINDS = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
_DEPENDS = ["depends", "--recurse", *(f"--no-{kind}" for kind in _KINDS)]
# What packages name in order to be configured, or to run scripts, which nobody does here.
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_NEVER = frozenset({"debconf", "debconf-2.0", "cdebconf", "dpkg", "perl", "perl-base", "init-system-helpers"})


def unpack(packages: Sequence[str], root: Path, step: Callable[[str, int, int], None], *, closure: bool = True) -> list[str]:
    """Into `root`, with what they depend on if `closure`. Returns the file names, NAME_VERSION_ARCH.deb.

    Raises SetupFailed where apt is not at hand, or has not what is asked for.
    """
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        raise SetupFailed(
            "this needs Debian's package tools",
            cause=f"no {', '.join(missing)} here",
            remediation="on another system make an image from a directory: fumehood image build NAME --root DIR",
        )
    names = _closure(packages) if closure else list(packages)
    with tempfile.TemporaryDirectory(prefix="fumehood-debs-") as directory:
        step("fetching packages", 0, len(names) + 1)
        _run(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *names], Path(directory))
        debs = sorted(Path(directory).glob("*.deb"))
        for number, deb in enumerate(debs):
            step("unpacking packages", number + 1, len(names) + 1)
            _run(["dpkg-deb", "-x", str(deb), str(root)], Path(directory))
        return [deb.name for deb in debs]


def candidate(package: str) -> str:
    """The version that would be fetched. Raises SetupFailed."""
    found = re.search(r"Candidate: (\S+)", _run(["apt-cache", "policy", package], Path("/")))
    if found is None or found[1] == "(none)":
        raise SetupFailed(f"apt has no package {package}", cause="its lists do not name it", remediation="apt-get update")
    return found[1]


def first_dependency(package: str) -> str:
    """What a metapackage stands for at present."""
    found = re.search(r"Depends: (\S+)", _run(["apt-cache", "depends", package], Path("/")))
    if found is None:
        raise SetupFailed(f"the package {package} depends on nothing", cause="it should name a kernel")
    return found[1]


def _closure(packages: Sequence[str]) -> list[str]:
    text = _run(["apt-cache", *_DEPENDS, *packages], Path("/"))
    return sorted({line for line in text.splitlines() if re.match(r"[a-z0-9]", line)} - _NEVER)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=_ENVIRONMENT)
    if done.returncode:
        raise SetupFailed(f"{command[0]} failed", cause=done.stderr.strip()[-500:], remediation="apt-get update, retry")
    return done.stdout
