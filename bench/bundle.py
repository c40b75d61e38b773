"""The OCI bundle for crun, runc and runsc: a root made of read-only binds, and every namespace. No limits, no seccomp."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_NAMESPACES = ("pid", "network", "ipc", "uts", "mount", "cgroup", "user")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")


def python_prefixes() -> list[str]:
    """Where the interpreter that runs this and its packages lie: what every peer has to show, and no more."""
    found = {os.path.realpath(sys.base_prefix), sys.prefix, str(Path(sys.executable).resolve().parents[1])}
    return sorted(p for p in found if not p.startswith("/usr/") and p != "/usr")


def system_entries() -> tuple[list[str], dict[str, str]]:
    """(directories to bind, links to make) of the host's system part; merged-/usr hosts have links at the top."""
    directories = [d for d in _SYSTEM if os.path.isdir(d) and not os.path.islink(d)]
    return directories, {d: os.readlink(d) for d in _SYSTEM if os.path.islink(d)}


def write(where: Path, argv: Sequence[str], namespaces: Sequence[str] = _NAMESPACES) -> Path:
    """Make `where` a bundle that runs `argv`. Returns `where`. Raises OSError."""
    directories, links = system_entries()
    root = where / "rootfs"
    for d in (*directories, *python_prefixes(), "/proc", "/dev", "/tmp"):
        (root / d[1:]).mkdir(parents=True, exist_ok=True)
    for link, to in links.items():
        if not (root / link[1:]).is_symlink():
            (root / link[1:]).symlink_to(to)
    (where / "config.json").write_text(json.dumps(_config(argv, directories, namespaces), indent=1))
    return where


def _config(argv: Sequence[str], directories: Sequence[str], namespaces: Sequence[str]) -> dict[str, Any]:
    linux: dict[str, Any] = {"namespaces": [{"type": n} for n in namespaces]}
    if "user" in namespaces:
        linux |= {
            "uidMappings": [{"containerID": 0, "hostID": os.geteuid(), "size": 1}],
            "gidMappings": [{"containerID": 0, "hostID": os.getegid(), "size": 1}],
        }
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": ["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/tmp", "LANG=C.UTF-8"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "size=64m"]},
            *(_bind(d) for d in (*directories, *python_prefixes())),
        ],
        "linux": linux,
    }


def _bind(path: str) -> dict[str, Any]:
    return {"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro", "nosuid", "nodev"]}
