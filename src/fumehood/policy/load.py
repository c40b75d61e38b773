"""Policies from files and presets: the only I/O of this room. Everything read here is checked by rules.Policy.

`chain` follows `extends` and gives the documents base first; it looks nothing up twice and refuses circles.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fumehood.errors import PolicyError, ProfileError
from fumehood.policy import document
from fumehood.policy.rules import Policy

Source = str | Path | Policy | Mapping[str, Any]
_MAX_BYTES = 1 << 20
_PRESETS = resources.files("fumehood.policy") / "presets"


@cache
def preset_names() -> tuple[str, ...]:
    """The presets that ship with fumehood, sorted."""
    return tuple(sorted(f.name.removesuffix(".toml") for f in _PRESETS.iterdir() if f.name.endswith(".toml")))


def chain(source: Source) -> list[Policy]:
    """The documents that `source` is made of, the outermost base first.

    A str is a preset's name, or a path when it holds "/" or ends in .toml, .yaml or .yml. Raises PolicyError for an
    unknown preset, an unreadable or wrong file, or a circle of `extends`; ProfileError for the seccomp JSON.
    """
    documents: list[Policy] = []
    seen: list[str] = []
    here = Path.cwd()
    while True:
        policy, label, here = _open(source, here)
        if label in seen:
            raise PolicyError(
                f"policies extend each other in a circle: {' -> '.join([*seen, label])}",
                cause="extends must end at a policy that extends nothing",
                remediation=f"remove extends from {label}",
            )
        seen.append(label)
        documents.insert(0, policy)
        if policy.extends is None:
            return documents
        source = policy.extends


def profile_of(source: Source) -> str:
    """The file of the seccomp profile that holds for `source`; "" if there is none or it was given as an object."""
    return next((document.profile for document in reversed(chain(source)) if document.seccomp is not None), "")


def _open(source: Source, here: Path) -> tuple[Policy, str, Path]:
    """(policy, a label that is the same for the same source, the directory that its relative paths start at)."""
    if isinstance(source, Policy):
        return source, f"Policy object {id(source):x}", here
    if isinstance(source, Mapping):
        return _policy(dict(source), "<mapping>", here, {}), f"mapping {id(source):x}", here
    if isinstance(source, Path) or "/" in source or source.endswith((".toml", ".yaml", ".yml")):
        path = (here / source).resolve()
        return _read(path), str(path), path.parent
    if source not in preset_names():  # membership before any path is built from the name (H14)
        raise PolicyError(
            f"no preset is named {source[:64]!r}; known: {', '.join(preset_names())}",
            cause="presets ship with fumehood; other policies are files",
            remediation="use a known name, or a path that holds '/' or ends in .toml, .yaml or .yml",
        )
    return _preset(source), f"preset {source}", here


@cache
def _preset(name: str) -> Policy:
    return _parse((_PRESETS / f"{name}.toml").read_text(), f"preset {name}.toml", Path("/"))


def _read(path: Path) -> Policy:
    return _parse(_text(path, PolicyError), str(path), path.parent)


def _text(path: Path, error: type[PolicyError] | type[ProfileError]) -> str:
    try:
        status = path.stat()
        # A FIFO would keep us waiting, a device would never end.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            cause = f"it must be a regular file of at most {_MAX_BYTES} bytes"
            raise error(f"can't read {path}: {cause}", cause=cause, remediation="give such a file")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise error(f"can't read {path}: {e}", cause=str(e), remediation="give a readable UTF-8 file") from None


def _parse(text: str, where: str, here: Path) -> Policy:
    try:
        data, lines = document.parse(text, is_toml=where.endswith(".toml"))
    except ValueError as e:
        what = " ".join(str(e).split())
        raise PolicyError(f"{where}: {what}", cause=what, remediation="correct the document there") from None
    return _policy(data, where, here, lines)


def _policy(data: dict[str, Any], where: str, here: Path, lines: document.Lines) -> Policy:
    profile = ""
    if isinstance(data.get("seccomp"), str):
        path = (here / data["seccomp"]).resolve()
        data, profile = {**data, "seccomp": _profile(path)}, str(path)
    try:
        return Policy(**data).read_from(where, profile)
    except PolicyError as e:
        found = (lines.get(tuple(str(p) for p in key if isinstance(p, str))) for key in e.details["keys"])
        line = next((n for n in found if n), None)
        at = f"{where}:{line}" if line else where
        raise PolicyError(
            f"{at}: {e.message}", cause=e.cause, remediation=e.remediation, file=where, line=line, keys=e.details["keys"]
        ) from None


def _profile(path: Path) -> dict[str, Any]:
    """The OCI seccomp JSON. Its meaning is checked where it is compiled; here only that it is one JSON object (M6)."""
    try:
        value = json.loads(_text(path, ProfileError), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise ProfileError(f"{path}: {e}", cause="not JSON", remediation="correct the file at that line") from None
    if not isinstance(value, dict) or "defaultAction" not in value:
        raise ProfileError(
            f"{path}: no defaultAction", cause="not an OCI seccomp profile", remediation="add defaultAction and syscalls"
        )
    return value  # pyright: ignore[reportUnknownVariableType]


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    # The last of two equal keys would win in silence; in a security document that is an ambush.
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} appears twice")
        found[key] = value
    return found
