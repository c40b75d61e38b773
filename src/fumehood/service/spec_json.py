"""A spec as JSON text and back: what a snapshot's record keeps of the sandbox that it was made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from fumehood.errors import FumehoodError, StoreFailed
from fumehood.model import FileRules, Limits, Mount, SandboxSpec, Template


def to_text(spec: SandboxSpec) -> str:
    """In ASCII: a value of env need not be Unicode."""
    return json.dumps({**asdict(spec), "require": sorted(spec.require)}, separators=(",", ":"))


def from_text(text: str) -> SandboxSpec:
    """Raises StoreFailed. Not by pydantic, which takes no half surrogate pair."""
    try:
        form: dict[str, Any] = json.loads(text)
        template, limits, files = (form.pop(name) for name in ("template", "limits", "files"))
        mounts = tuple(Mount(**mount) for mount in template.pop("mounts"))
        return SandboxSpec(
            template=Template(mounts=mounts, preload=tuple(template.pop("preload")), **template),
            limits=Limits(**limits),
            files=FileRules(**{name: tuple(paths) for name, paths in files.items()}),
            require=frozenset(form.pop("require")),
            **form,
        )
    except (ValueError, TypeError, LookupError, AttributeError, FumehoodError) as e:
        raise StoreFailed(
            "the record of a snapshot is damaged, or of another version", cause=str(e), remediation="discard that snapshot"
        ) from e
