"""The policy's file rules in a guest: mounts that its user can't undo. Once, before the first program of the user's."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence

from . import boot
from .args import RULES
from .loop import Refused

Rules = Mapping[str, Sequence[str]]  # writable, read_only, hidden: absolute paths; hidden beats read_only beats writable
_EMPTY = f"{boot.RUN}/nothing"  # a file and a directory that nobody can open


def apply(rules: Rules) -> None:
    """Raises Refused for a rule that could not hold, and then none may be relied on: it fails closed (H13)."""
    writable, read_only, hidden = (tuple(rules.get(name, ())) for name in RULES)
    for path in (*writable, *read_only, *hidden):
        if os.path.realpath(path) != path or not os.path.exists(path):
            raise Refused("invalid", f"the policy names {path}, which is a link, or not there when a sandbox starts", "ENOENT")
    for path in writable:
        if not any(_is_in(path, top) for top in boot.WRITABLE):
            raise Refused("unsupported", f"{path} can't be writable: a machine's disk is read-only")
    for top in boot.WRITABLE:
        if not any(_is_in(top, path) for path in writable):
            _only_these(top, [path for path in writable if _is_in(path, top)])
    for path in read_only:
        _only_these(path, [])
    for path in hidden:
        _hide(path)


def _is_in(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _only_these(path: str, writable: Sequence[str]) -> None:
    boot.mount(path, path, flags=boot.BIND)
    for inner in writable:
        boot.mount(inner, inner, flags=boot.BIND)
    boot.mount("", path, flags=boot.REMOUNT | boot.BIND | boot.RDONLY | boot.NOSUID | boot.NODEV)


def _hide(path: str) -> None:
    if stat.S_ISDIR(os.stat(path).st_mode):
        boot.mount("nothing", path, "tmpfs", boot.QUIET | boot.RDONLY, "mode=000,size=4k,nr_inodes=1")
        return
    os.close(os.open(_EMPTY, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o000))
    boot.mount(_EMPTY, path, flags=boot.BIND)
    boot.mount("", path, flags=boot.REMOUNT | boot.BIND | boot.RDONLY | boot.NOSUID | boot.NODEV)
