"""What a server answers, read as hostile input: bounded, and either what was asked for or a typed error."""

from __future__ import annotations

import json
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from fumehood import errors
from fumehood.agent.wire import table
from fumehood.errors import FumehoodError, ServerUnreachable
from fumehood.model import MIB, Result

MAX_ANSWER_BYTES = 64 * MIB
MAX_RESULT_BYTES = 256 * MIB  # of one execution: its results may have 64 MiB, its output whatever its limits allow
_MAX_TEXT = 65_536
T = TypeVar("T")
_RESULT = TypeAdapter(Result)
_CODES: dict[str, type[FumehoodError]] = {
    c.code: c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FumehoodError)
}


def unreachable(url: str, cause: str) -> ServerUnreachable:
    return ServerUnreachable(
        f"no answer from the server at {url}",
        cause=cause,
        remediation="see that fumehood serve runs there and that the address is right; then try again",
    )


def not_ours(url: str, cause: str) -> ServerUnreachable:
    """Something answers, but not as fumehood would: a proxy, another program, another version."""
    return ServerUnreachable(
        f"what answers at {url} is not a fumehood server",
        cause=cause,
        remediation="correct the address (the API is below it at /v1), or look at the proxy in between",
    )


def parsed(url: str, data: bytes) -> dict[str, Any]:
    """A JSON object. By json and not by pydantic: names of files may hold lone surrogates, which only json takes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise not_ours(url, f"its answer is not JSON: {str(e)[:200]}") from None
    if not isinstance(value, dict):
        raise not_ours(url, "its answer is not a JSON object")
    return cast("dict[str, Any]", value)


def result_of(url: str, data: bytes) -> Result:
    try:
        return _RESULT.validate_json(data)
    except ValidationError:
        return result_from(url, parsed(url, data))


def result_from(url: str, value: object) -> Result:
    return typed(url, _RESULT, value)


def typed(url: str, kind: TypeAdapter[T], value: object) -> T:
    try:
        return kind.validate_python(value)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise not_ours(url, f"its answer has a field of another kind: {where}: {first['msg']}") from None


def problem(url: str, status: int, data: bytes) -> FumehoodError:
    """The error that the server named, as the class that an embedded sandbox would have raised."""
    try:
        value = parsed(url, data)
    except ServerUnreachable as e:
        return not_ours(url, f"status {status}; {e.cause}")
    return problem_from(url, value, status)


def problem_from(url: str, value: dict[str, Any], status: int | None = None) -> FumehoodError:
    code = value.get("code")
    if not isinstance(code, str):
        return not_ours(url, f"status {status} without a code")
    texts = {name: str(value.get(name) or "")[:_MAX_TEXT] for name in ("message", "cause", "remediation")}
    details = {k: v for k, v in table(value.get("details")).items() if k not in texts}
    if request_id := value.get("request_id"):
        details["request_id"] = request_id
    error = _CODES.get(code, FumehoodError)(texts.pop("message") or code, **texts)
    error.details = details
    if isinstance(said := value.get("retryable"), bool):  # it may depend on the moment, not on the code alone
        error.retryable = said
    if code not in _CODES:  # of a newer server: its word is kept
        error.code = code[:64]
    return error
