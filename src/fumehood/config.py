"""One frozen Config from file and environment. The only reader of os.environ in the package.

Later beats earlier: the fields' defaults, the file (FUMEHOOD_CONFIG or ~/.config/fumehood/config.toml), FUMEHOOD_<FIELD>.
A key or variable that nobody knows is refused: a mistyped FUMEHOOD_TIER must not silently mean another tier (H13).
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fumehood.errors import InvalidInput
from fumehood.model import check_id

TIERS = ("auto", "native", "oci", "microvm", "fake")  # "auto" never chooses fake
_PREFIX = "FUMEHOOD_"


@dataclass(frozen=True, slots=True)
class Config:
    """Both directories exist, are the caller's own and closed to others. Times in seconds."""

    state_dir: Path  # journal, audit log: survives a reboot
    run_dir: Path  # sockets, roots of templates: gone after a reboot
    uid_base: int = 200_000_000  # root only: sandbox n of this supervisor runs as host uid uid_base + n
    uid_count_per_supervisor: int = 1024
    cgroup_parent: str = "fumehood"
    tier: str = "auto"
    default_policy: str = "default"
    zygote_start_timeout_s: float = 20.0
    agent_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        check_id(self.cgroup_parent, "cgroup_parent")
        faults = [
            (self.tier not in TIERS, "tier", f"one of {', '.join(TIERS)}"),
            # Below are the host's own users and the usual /etc/subuid ranges; above, (uid_t)-1 and its neighbours.
            (not 1 << 20 <= self.uid_base <= 1 << 31, "uid_base", f"from {1 << 20} to {1 << 31}"),
            (not 1 <= self.uid_count_per_supervisor <= 1 << 16, "uid_count_per_supervisor", f"from 1 to {1 << 16}"),
            (not 0 < self.zygote_start_timeout_s <= 3600, "zygote_start_timeout_s", "over 0, at most 3600"),
            (not 0 < self.agent_timeout_s <= 3600, "agent_timeout_s", "over 0, at most 3600"),
            (not self.default_policy, "default_policy", "a preset's name or a path"),
        ]
        for wrong, name, allowed in faults:
            if wrong:
                raise _wrong(f"config {name} = {getattr(self, name)!r}", f"it must be {allowed}")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, *, uid: int | None = None) -> Config:
        """Read file and environment, make the two directories (0700). `environ` None = the process's own.

        Raises InvalidInput for an unknown or ill-typed setting, and for a directory that is not safely one's own.
        """
        environ = os.environ if environ is None else environ
        uid = os.geteuid() if uid is None else uid
        settings = {**_directories(environ, uid), **_from_file(environ, uid), **_from_environment(environ)}
        config = cls(**settings)
        for directory in (config.state_dir, config.run_dir):
            _own(directory, uid)
        return config


def _wrong(message: str, cause: str, remediation: str = "correct that setting") -> InvalidInput:
    return InvalidInput(f"{message}: {cause}", cause=cause, remediation=remediation)


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ["HOME"]) if environ.get("HOME") else Path.home()


def _directories(environ: Mapping[str, str], uid: int) -> dict[str, Any]:
    if uid == 0:
        return {"state_dir": Path("/var/lib/fumehood"), "run_dir": Path("/run/fumehood")}
    session = environ.get("XDG_RUNTIME_DIR")
    run = Path(session, "fumehood") if session else Path(f"/tmp/fumehood-{uid}")
    return {"state_dir": _home(environ) / ".local/state/fumehood", "run_dir": run}


def _from_file(environ: Mapping[str, str], uid: int) -> dict[str, Any]:
    named = environ.get(_PREFIX + "CONFIG")
    path = Path(named) if named else _home(environ) / ".config/fumehood/config.toml"
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            # Whoever can write this file chooses the tier and the uids of every sandbox.
            if status.st_uid not in (0, uid) or status.st_mode & 0o022:
                raise _wrong(str(path), "others may write it", f"chown it to yourself and chmod go-w {path}")
            values = tomllib.load(file)
    except FileNotFoundError:
        if named:
            raise _wrong(named, "no such file", "correct FUMEHOOD_CONFIG or unset it") from None
        return {}
    except (OSError, ValueError) as e:
        raise _wrong(str(path), str(e)) from None
    return {name: _typed(name, value, str(path)) for name, value in values.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = [v for v in environ if v.startswith(_PREFIX) and v != _PREFIX + "CONFIG"]
    return {(n := v.removeprefix(_PREFIX).lower()): _typed(n, environ[v], v) for v in names}


def _typed(name: str, value: object, where: str) -> object:
    """`value` as the field's type; text is read as a number where the field is one."""
    kinds = {f.name: f.type for f in fields(Config)}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, 1, 0.5)
        raise _wrong(f"{where}: {name!r}", "unknown setting", f"use {close[0]!r}" if close else f"known: {', '.join(kinds)}")
    kind = kinds[name]
    if kind == "Path" and isinstance(value, str) and value.startswith("/"):
        return Path(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind in ("int", "float") and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return int(str(value)) if kind == "int" else float(value)
        except ValueError:
            pass  # refused just below, with the same words as any other wrong type
    wanted = {"Path": "an absolute path", "str": "text", "int": "a whole number", "float": "a number"}[str(kind)]
    raise _wrong(f"{where}: {name} = {value!r}", f"it must be {wanted}")


def _own(directory: Path, uid: int) -> None:
    """Make `directory` 0700, or check that it is a real directory of ours that nobody else can enter or write.

    mkdir and then lstat: in /tmp somebody else may have planted a symlink or a directory of theirs first (H12).
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as e:
        raise _wrong(
            str(directory), e.strerror or str(e), "choose another with FUMEHOOD_STATE_DIR or FUMEHOOD_RUN_DIR"
        ) from None
    if not stat.S_ISDIR(status.st_mode):
        raise _wrong(str(directory), "not a directory (symlinks are refused)", "remove it, or choose another")
    if status.st_uid != uid or status.st_mode & 0o077:
        raise _wrong(str(directory), f"it must belong to uid {uid} with mode 0700", "remove it, or choose another")
