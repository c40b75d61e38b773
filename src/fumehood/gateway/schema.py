"""What may be sent, and what is answered, as docs/http.md and /openapi.json show it. Unknown members are refused (H13)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema

from fumehood.errors import InvalidInput
from fumehood.records import OnExpiry
from fumehood.service import CreateAsk

T = TypeVar("T")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("it must be text")
    return value


def _name(value: object) -> str:
    text = _text(value)
    if "\0" in text:
        raise ValueError("it must not hold a NUL byte")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it must be a finite number")
    return value


# Names of files and programs need not be Unicode: half a surrogate pair stands for a byte, as everywhere in Python.
Text = Annotated[str, PlainValidator(_text), WithJsonSchema({"type": "string"})]
Name = Annotated[str, PlainValidator(_name), WithJsonSchema({"type": "string", "pattern": "^[^\\u0000]*$"})]
Env = Annotated[dict[str, Name], Field(max_length=1_024)]
Seconds = Annotated[float, BeforeValidator(_finite), Field(gt=0, le=30 * 86_400)]
Priority = Annotated[int, Field(ge=-10, le=10)]
Language = Annotated[str, Field(max_length=32)]
SnapshotId = Annotated[str, Field(max_length=64)]
Label = Annotated[str, Field(max_length=4_096)]
Labels = Annotated[dict[Annotated[str, Field(max_length=256)], Label], Field(max_length=128)]
Policy = Annotated[str | dict[str, Any] | None, Field(description="a preset's name, or a policy as docs/policy.md has it")]
Limits = Annotated[dict[str, int | float | str], Field(max_length=64)]  # a float is no number of processes


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NewSandbox(Body):
    policy: Annotated[
        str | dict[str, Any] | None, Field(description="a preset's name, or a policy as docs/policy.md has it")
    ] = None
    template: Annotated[str | None, Field(max_length=256)] = None
    limits: Limits = {}
    env: Env = {}
    tier: Annotated[str, Field(max_length=32)] = "auto"
    metadata: Labels = {}
    lease_s: Seconds | None = None
    on_expiry: OnExpiry = "kill"
    auto_resume: bool = False
    priority: Priority = 0
    wait_s: Annotated[Seconds | None, Field(description="in the queue, at most")] = None
    snapshot: Annotated[
        SnapshotId | None, Field(description="to go on from; it keeps its template, tier, policy and limits")
    ] = None

    def ask(self) -> CreateAsk:
        return CreateAsk(**{name: getattr(self, name) for name in NewSandbox.model_fields})


class _Execution(Body):
    env: Env = {}
    timeout_s: Annotated[
        Seconds | None, Field(description="from the arrival of the request; the sandbox's own bound is the most")
    ] = None
    priority: Priority = 0
    wait_s: Seconds | None = None


class Run(_Execution):
    """Code in a context of a sandbox."""

    code: Text
    language: Language = "python"
    context: Annotated[Name | None, Field(description="none: the default one of the language")] = None
    wait: Annotated[bool, Field(description="false: 202 at once, and the result under /v1/executions")] = True


class RunOnce(_Execution):
    """Code in a sandbox of its own, which is gone when the answer comes."""

    code: Text
    language: Language = "python"
    policy: Policy = None
    template: Annotated[str | None, Field(max_length=256)] = None
    limits: Limits = {}
    tier: Annotated[str, Field(max_length=32)] = "auto"

    def ask(self) -> CreateAsk:
        names = ("policy", "template", "limits", "tier", "priority", "wait_s")
        return CreateAsk(**{name: getattr(self, name) for name in names})


class Exec(_Execution):
    """A program, to its end: `argv`, or a line for bash as `command`."""

    argv: Annotated[list[Name] | None, Field(min_length=1, max_length=65_536)] = None
    command: Name | None = None
    cwd: Name | None = None
    stdin: Text | None = None
    stdin_base64: str | None = None
    wait: bool = True


class Size(Body):
    rows: Annotated[int, Field(ge=1, le=65_535)]
    cols: Annotated[int, Field(ge=1, le=65_535)]


class Start(Body):
    """The first message of a process's socket."""

    argv: Annotated[list[Name], Field(min_length=1, max_length=65_536)]
    env: Env = {}
    cwd: Name | None = None
    stdin: bool = False
    pty: Size | None = None
    tag: Annotated[str | None, Field(max_length=256)] = None


class Lease(Body):
    lease_s: Annotated[float, BeforeValidator(_finite), Field(description="from now; 0 or less ends it", le=30 * 86_400)]


class Checkpoint(Body):
    context: Name | None = None


class Rollback(Body):
    """Either."""

    checkpoint: Annotated[Name | None, Field(description="of a context")] = None
    snapshot: Annotated[SnapshotId | None, Field(description="of this sandbox, or of one with the same policy")] = None


class NewSnapshot(Body):
    metadata: Labels = {}


class Fork(Body):
    count: Annotated[int, Field(ge=1, le=64)] = 1
    lease_s: Seconds | None = None
    metadata: Annotated[Labels | None, Field(description="none: that of the sandbox")] = None


class NewContext(Body):
    language: Language = "python"
    cwd: Name | None = None
    id: Annotated[str | None, Field(max_length=64)] = None


class Signal(Body):
    signal: Annotated[int, Field(ge=1, le=64)]
    group: bool = False


class Mkdir(Body):
    path: Name


class Move(Body):
    source: Name
    destination: Name


class Sign(Body):
    path: Name
    method: Literal["GET", "PUT"] = "GET"
    expires_s: Annotated[float, BeforeValidator(_finite), Field(gt=0, le=7 * 86_400)] = 3_600.0


class NewKey(Body):
    tenant: Annotated[str, Field(pattern="^[a-z][a-z0-9]{3,31}$")] = "local"
    name: Annotated[str, Field(max_length=256)] = ""
    scopes: Annotated[list[Literal["sandboxes", "admin"]], Field(min_length=1, max_length=2)] = ["sandboxes"]
    limits: dict[str, Annotated[float, BeforeValidator(_finite)]] = {}
    compat: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=16)] = []


def read(model: type[T] | TypeAdapter[T], value: object) -> T:
    """`value` as that. Raises InvalidInput with what is wrong where, without the values: those may be secrets."""
    adapter = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    try:
        return adapter.validate_python(value)
    except ValidationError as e:
        raise InvalidInput("the request is wrong", cause=faults(e.errors(include_url=False, include_input=False))) from None


def faults(errors: Sequence[Any]) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in e['loc'])[:200]}: {e['msg'][:200]}" for e in errors[:8])
