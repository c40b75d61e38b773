"""The policy document: what may be written, and a clear refusal of everything else.

Keys under [limits] are the fields of `model.Limits`; sizes may be written "512MiB" or "10MB", durations "30s" or "5m".
A key that nobody knows is refused, never ignored: a typo in a limit would otherwise be a sandbox without it (H13).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from fumehood.errors import PolicyError
from fumehood.model import Limits

_SIZE_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)}}
_BINARY_UNITS = {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}
_TIME_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")
MAX_TOLD, _TOLD_CHARS = 32, 1_000  # faults of one document, and of each: a server's callers send documents of megabytes
_RANGES = {f.name: (f.metadata["low"], f.metadata["high"]) for f in fields(Limits)}


def _quantity(value: object, units: Mapping[str, float], example: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    unit = units.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{value!r} is no amount; write it like {example}, units: {', '.join(filter(None, units))}")
    return float(match[1]) * unit


def _size(value: object) -> int:
    amount = _quantity(value, _SIZE_UNITS | _BINARY_UNITS, '"512MiB"')
    if isinstance(amount, float) and not amount.is_integer():  # also refuses nan and inf
        raise ValueError(f"{value!r} is no whole number of bytes")
    return int(amount)


def duration(value: object) -> float:
    """Seconds, from a number or text such as "90s". Raises ValueError."""
    return _quantity(value, _TIME_UNITS, '"30s"')


def _absolute(path: str) -> str:
    """Refuses what could name another place than it seems to: relative, "..", doubled slashes, NUL (H12)."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or "\0" in path or (path != "/" and any(p in ("", ".", "..") for p in parts)):
        raise ValueError(f"{path!r} is not a plain absolute path; write it without '..', '.', '//' and a last '/'")
    return path


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r} is no name of an environment variable")
    return name


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError("the value holds a NUL byte")
    return value


def _refuse_allow(value: object) -> object:
    raise ValueError("an allow list is not yet enforced by this generation, so it is refused; remove it")


Size = Annotated[int, BeforeValidator(_size)]
Duration = Annotated[float, BeforeValidator(duration)]
AbsolutePath = Annotated[str, BeforeValidator(lambda v: _absolute(v) if isinstance(v, str) else v)]
Module = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")]
Paths = Annotated[tuple[AbsolutePath, ...], Field(strict=False, max_length=256)]  # a TOML array is a list
EnvName = Annotated[str, BeforeValidator(lambda v: _variable(v) if isinstance(v, str) else v)]
EnvValue = Annotated[str, BeforeValidator(lambda v: _no_nul(v) if isinstance(v, str) else v)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LimitsSection(_Section):
    """model.Limits with every field optional: what is absent comes from the policy that this one extends."""

    cpus: float | None = None
    cpu_weight: int | None = None
    memory_bytes: Size | None = None
    swap_bytes: Size | None = None
    pids: int | None = None
    disk_bytes: Size | None = None
    inodes: int | None = None
    open_files: int | None = None
    io_read_bps: Size | None = None
    io_write_bps: Size | None = None
    timeout_s: Duration | None = None
    output_bytes: Size | None = None
    output_kill_bytes: Size | None = None
    lifetime_s: Duration | None = None

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        low, high = _RANGES[info.field_name or ""]
        if value is not None and not low <= value <= high:
            raise ValueError(f"{value} is out of range: from {low} to {high}")
        return value


class FilesSection(_Section):
    """Paths inside the sandbox. hidden beats read_only beats writable."""

    writable: Paths | None = None
    read_only: Paths | None = None
    hidden: Paths = ()


class NetworkSection(_Section):
    """Only "none" in this generation. Anything else fails closed, for what is not enforced must not seem so (H9, H13)."""

    mode: str = "none"
    allow: Annotated[object, BeforeValidator(_refuse_allow)] = None

    @field_validator("mode")
    @classmethod
    def _none_only(cls, value: str) -> str:
        if value != "none":
            raise ValueError(f'{value!r} is not yet enforced by this generation, so it is refused; write "none"')
        return value


class MountSection(_Section):
    source: AbsolutePath
    target: AbsolutePath
    writable: bool = False


class TemplateSection(_Section):
    """With `name` alone: a builtin template. With `preload`, `root` or `mounts`: a template of one's own."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,31}$")]
    root: AbsolutePath | None = None
    preload: Annotated[tuple[Module, ...], Field(strict=False)] | None = None
    mounts: Annotated[tuple[MountSection, ...], Field(strict=False)] = ()


class Policy(_Section):
    """One document. `Policy(**mapping)` raises PolicyError with every fault found, never pydantic's own error."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    description: str = ""
    extends: str | None = None
    template: TemplateSection | None = None
    limits: LimitsSection = LimitsSection()
    files: FilesSection = FilesSection()
    network: NetworkSection = NetworkSection()
    seccomp: Annotated[dict[str, Any] | None, Field(description="the OCI JSON, parsed; a path in a document")] = None
    env: dict[EnvName, EnvValue] = {}
    require: Annotated[frozenset[str], Field(strict=False)] = frozenset()

    _origin: str = PrivateAttr("")  # its own file, and that of its seccomp profile: for messages only
    _profile: str = PrivateAttr("")

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as e:
            raise _refusal(e.errors(include_url=False)) from None

    @property
    def origin(self) -> str:
        """Its file's path, `preset NAME.toml` or `<mapping>`; "" for a Policy made in Python."""
        return self._origin

    @property
    def profile(self) -> str:
        """The path of its seccomp profile's file; "" if there is none."""
        return self._profile

    def read_from(self, origin: str, profile: str) -> Self:
        """Say where it came from."""
        self._origin, self._profile = origin, profile
        return self

    @field_validator("template", mode="before")
    @classmethod
    def _template_by_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("limits", mode="before")
    @classmethod
    def _limits_as_section(cls, value: object) -> object:
        return asdict(value) if isinstance(value, Limits) else value


_KEYS: dict[tuple[str, ...], type[_Section]] = {
    (): Policy,
    ("limits",): LimitsSection,
    ("files",): FilesSection,
    ("network",): NetworkSection,
    ("template",): TemplateSection,
    ("template", "mounts"): MountSection,
}


def nearest(key: str, known: list[str]) -> str:
    """What to write instead of an unknown key: the nearest known one, else all of them."""
    close = difflib.get_close_matches(key, known, 1, 0.5) or [k for k in known if k.startswith(key)]
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def _say(error: ErrorDetails) -> str:
    loc = error["loc"]
    key = ".".join(str(part) for part in loc if part != "[key]")[:_TOLD_CHARS]
    if error["type"] == "extra_forbidden":
        section = _KEYS[tuple(str(part) for part in loc[:-1] if isinstance(part, str))]
        return f"{key}: unknown key; {nearest(str(loc[-1])[:64], list(section.model_fields))}"
    return f"{key}: {error['msg'].removeprefix('Value error, ')[:_TOLD_CHARS]}"


def _refusal(errors: list[ErrorDetails]) -> PolicyError:
    more = [f"and {len(errors) - MAX_TOLD} more"] if len(errors) > MAX_TOLD else []
    errors = errors[:MAX_TOLD]
    return PolicyError(
        "policy refused: " + "; ".join([*map(_say, errors), *more]),
        cause="the document does not have the shape of a policy",
        remediation="correct the keys named above; docs/policy.md lists them all",
        keys=[[part for part in e["loc"] if part != "[key]"] for e in errors],
    )
