"""One frozen Config from file and environment. The only reader of os.environ in the package.

Later beats earlier: the fields' defaults, the file (FUMEHOOD_CONFIG or ~/.config/fumehood/config.toml), systemd's credentials
named fumehood.<field>, FUMEHOOD_<FIELD>.
A key or variable that nobody knows is refused: a mistyped FUMEHOOD_TIER must not silently mean another tier (H13).
"""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fumehood.errors import InvalidInput
from fumehood.model import check_id

TIERS = ("auto", "native", "firecracker", "qemu", "fake")  # "auto" never chooses fake
_PREFIX = "FUMEHOOD_"
_GIB = 1 << 30


def _setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None, one_of: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "one_of": one_of})


@dataclass(frozen=True, slots=True)
class Config:
    """Both directories exist, are the caller's own and closed to others. Times in seconds. docs/config.md is made from this."""

    state_dir: Path = field(metadata={"doc": "journal, store, key of the local server: survives a reboot"})
    run_dir: Path = field(metadata={"doc": "sockets, roots of templates: gone after a reboot"})

    # -- sandboxes
    # Below are the host's own users and the usual /etc/subuid ranges; above, (uid_t)-1 and its neighbours.
    uid_base: int = _setting(
        200_000_000, "root only: sandbox n of a supervisor runs as host uid uid_base + n", low=1 << 20, high=1 << 31
    )
    uid_count_per_supervisor: int = _setting(1024, "host uids that one supervisor takes for itself", low=1, high=1 << 16)
    cgroup_parent: str = _setting("fumehood", "the name of fumehood's own cgroup below the one that it may use")
    tier: str = _setting("auto", "the tier where a call names none", one_of=TIERS)
    default_policy: str = _setting("default", "a preset's name or a path, where a call names no policy")
    zygote_start_timeout_s: float = _setting(20.0, "building a template's root and preloading", low=0.01, high=3600)
    agent_timeout_s: float = _setting(5.0, "until a new sandbox's agent must have spoken", low=0.01, high=3600)

    # -- microVMs
    firecracker: str = _setting("", "its program, with jailer beside it; empty = found on PATH")
    qemu: str = _setting("", "qemu-system-x86_64 as a path; empty = found on PATH")
    microvm_boot_timeout_s: float = _setting(300.0, "until a machine that boots must have answered", low=1, high=3600)
    snapshot_budget_bytes: int = _setting(
        32 * _GIB, "of the disk for snapshots of sandboxes; more are refused", low=1 << 20, high=1 << 50
    )

    # -- the client
    url: str = _setting("", "a server for Sandbox() and the command line: http://, https:// or unix:/path; empty = embedded")
    api_key: str = _setting("", "the key that is shown to that server")

    # -- the server
    listen: str = _setting("127.0.0.1:8470", "HOST:PORT or unix:/path")
    server_key: str = _setting("", "an admin key of the operator's own choice, at least 32 characters; empty = none")
    public_url: str = _setting("", "how clients reach the server, for signed URLs; empty = as the request came")
    grace_s: float = _setting(20.0, "how long running work may take to end when the server is stopped", low=0, high=3600)
    max_body_bytes: int = _setting(8 << 20, "of a JSON request", low=1 << 10, high=_GIB)
    max_upload_bytes: int = _setting(_GIB, "of an uploaded file", low=1 << 10, high=1 << 44)
    header_timeout_s: float = _setting(10.0, "for a request's headers, and between two pieces of its body", low=0.1, high=600)
    max_connections: int = _setting(2_000, "at once; more are turned away", low=1, high=1 << 16)

    # -- admission
    max_sandboxes: int = _setting(500, "at once, over all tenants, warm ones not counted", low=1, high=1 << 16)
    max_sandboxes_per_tenant: int = _setting(0, "at once; 0 = no bound of its own", low=0, high=1 << 16)
    max_snapshots_per_tenant: int = _setting(100, "of whole sandboxes, kept until they are deleted", low=0, high=1 << 20)
    memory_budget_bytes: int = _setting(
        0, "for the memory limits of all sandboxes together; 0 = 85% of the host's", low=0, high=1 << 50
    )
    memory_overcommit: float = _setting(
        4.0, "by how much the limits together may pass that budget: most sandboxes stay far below their limit", low=1, high=100
    )
    max_running: int = _setting(0, "executions at once; 0 = 8 for each CPU", low=0, high=1 << 16)
    queue_limit: int = _setting(100, "requests that wait for a place, each for creations and executions", low=0, high=1 << 20)
    queue_wait_s: float = _setting(30.0, "the longest that a request waits for its place", low=0.01, high=3600)
    max_lifetime_s: float = _setting(86_400.0, "of a sandbox, whatever its lease is extended to", low=1, high=30 * 86_400)
    paused_lifetime_s: float = _setting(86_400.0, "of a sandbox that its expired lease has paused", low=1, high=30 * 86_400)

    # -- warm pool
    pool_policies: str = _setting(
        "default", "presets, comma-separated, of which sandboxes are warm from the start; empty = none"
    )
    pool_floor: int = _setting(2, "warm sandboxes that each of those keeps when nobody asks", low=0, high=4096)
    pool_ceiling: int = _setting(32, "warm sandboxes of one class at most", low=0, high=4096)
    pool_headroom: float = _setting(1.2, "of the expected peak concurrency (M12)", low=1, high=10)
    pool_idle_s: float = _setting(30.0, "after which a warm sandbox above the target is reclaimed (M14)", low=0.1, high=86_400)

    # -- records
    retention_s: float = _setting(
        7 * 86_400.0, "how long ended sandboxes, their executions and events are kept", low=60, high=3650 * 86_400
    )
    retention_rows: int = _setting(1_000_000, "executions kept at most", low=100, high=1 << 40)
    retention_bytes_per_tenant: int = _setting(
        _GIB,
        "results of a tenant's ended executions kept; the oldest results go first, their records stay",
        low=1 << 20,
        high=1 << 50,
    )
    flush_records: bool = _setting(
        False, "each record reaches the disk before its caller is answered, which takes milliseconds; else within a second"
    )

    def __post_init__(self) -> None:
        check_id(self.cgroup_parent, "cgroup_parent")
        for f in fields(self):
            value, rule = getattr(self, f.name), f.metadata
            low, high, one_of = rule.get("low"), rule.get("high"), rule.get("one_of")
            if one_of and value not in one_of:
                raise _wrong(f"config {f.name} = {value!r}", f"it must be one of {', '.join(one_of)}")
            if low is not None and not low <= value <= high:
                raise _wrong(f"config {f.name} = {value!r}", f"it must be from {low:g} to {high:g}")
        if not self.default_policy:
            raise _wrong("config default_policy = ''", "it must be a preset's name or a path")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, *, uid: int | None = None) -> Config:
        """Read file and environment, make the two directories (0700). `environ` None = the process's own.

        Raises InvalidInput for an unknown or ill-typed setting, and for a directory that is not safely one's own.
        """
        environ = os.environ if environ is None else environ
        uid = os.geteuid() if uid is None else uid
        files = {**_from_file(environ, uid), **_from_credentials(environ)}
        settings = {**_directories(environ, uid), **files, **_from_environment(environ)}
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


def _from_credentials(environ: Mapping[str, str]) -> dict[str, Any]:
    """What systemd passes as files (LoadCredential=): a key there is in no unit file and in no process's environment."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    found = sorted(Path(directory).glob("fumehood.*")) if directory else []
    try:
        return {(n := path.suffix[1:]): _typed(n, path.read_text().strip(), str(path)) for path in found}
    except (OSError, ValueError) as e:
        raise _wrong(str(directory), str(e)) from None


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
        raise _wrong(str(directory), "not a directory (symlinks are refused)", "choose another")
    if status.st_uid != uid or status.st_mode & 0o077:
        raise _wrong(str(directory), f"it must belong to uid {uid} with mode 0700", "choose another, or be its owner")
