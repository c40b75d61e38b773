"""What a model gets to read: bounded text, images as images, every field in the structured part, errors that say what to do."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent

from fumehood.errors import FumehoodError, InvalidInput
from fumehood.model import KIB, MIB, Result

TEXT_CHARS = 32 * KIB  # of each text: a context window is not a log file
IMAGE_BYTES, RESULTS = 4 * MIB, 16  # base64 text of all; more would cost every later turn of the conversation
_IMAGES = {"image/png": b"\x89PNG\r\n", "image/jpeg": b"\xff\xd8\xff", "image/gif": b"GIF8", "image/webp": b"RIFF"}
_TEXTS = ("text/markdown", "text/plain", "text/latex", "application/json")  # the first that is there is shown
_KEPT = 64 * KIB  # structured rich data of one type


def clip(text: str, limit: int = TEXT_CHARS) -> str:
    """Head and tail: errors stand at the end, what it was about at the start."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def from_result(result: Result) -> CallToolResult:
    """A program that failed is an answer like any other, marked as an error so that the model looks at why."""
    story, rich = _story(result), _rich(result)
    blocks = [_text(story or "(no output)"), *rich] if story or not rich else rich
    return CallToolResult(content=blocks, structured_content=_fields(result), is_error=not result.ok)


def from_error(error: FumehoodError) -> CallToolResult:
    told = error.to_dict()
    lines = [f"{error.code}: {clip(error.message, KIB)}"]
    lines += [f"{name}: {clip(told[name], KIB)}" for name in ("cause", "remediation") if told[name]]
    lines += ["retryable: the same call may work later"] if error.retryable else []
    fields = {k: v for k, v in told.items() if k != "details"}
    return CallToolResult(content=[_text("\n".join(lines))], structured_content={"error": fields}, is_error=True)


def from_fields(fields: Mapping[str, Any], text: str | None = None) -> CallToolResult:
    shown = text if text is not None else json.dumps(fields, indent=1)
    return CallToolResult(content=[_text(shown)], structured_content=dict(fields))


def from_file(path: str, data: bytes) -> CallToolResult:
    """A picture as a picture, UTF-8 as text, anything else as base64 in the structured part. Raises InvalidInput."""
    fields: dict[str, Any] = {"path": path, "size_bytes": len(data)}
    kind = next((mime for mime, magic in _IMAGES.items() if data.startswith(magic)), None)
    if kind is not None:
        image = ImageContent(data=base64.b64encode(data).decode(), mime_type=kind)
        return CallToolResult(content=[image], structured_content={**fields, "mime_type": kind})
    try:
        return CallToolResult(content=[_text(data.decode())], structured_content=fields)
    except UnicodeDecodeError:
        if len(data) > _KEPT:
            raise InvalidInput(
                f"{path} is {len(data)} bytes of binary data",
                cause=f"more than {_KEPT} bytes would not help a model",
                remediation="look at it with run_code",
            ) from None
    return from_fields({**fields, "base64": base64.b64encode(data).decode()}, f"{len(data)} bytes that are not UTF-8 text")


def _story(result: Result) -> str:
    head = [] if result.ok else [f"status: {result.status}" + (f" - {result.cause}" if result.cause else "")]
    if result.exit_code:
        head.append(f"exit code: {result.exit_code}")
    if result.refused_syscalls:
        head.append("refused system calls: " + ", ".join(f"{c.name} x{c.count}" for c in result.refused_syscalls))
    parts = [("", "\n".join(head)), ("", result.stdout), ("stderr:\n", result.stderr)]
    if result.error is not None:
        parts.append(("", result.error.traceback or f"{result.error.name}: {result.error.value}"))
    return "\n".join(label + clip(text.rstrip("\n")) for label, text in parts if text)


def _rich(result: Result) -> list[ContentBlock]:
    blocks: list[ContentBlock] = []
    left = IMAGE_BYTES
    for rich in result.results[:RESULTS]:
        kind = next((k for k in _IMAGES if k in rich.data), None)
        if kind is None:
            shown = next((rich.data[k] for k in _TEXTS if k in rich.data), None)
            blocks += [] if shown is None else [_text(shown if isinstance(shown, str) else json.dumps(shown))]
            continue
        encoded = str(rich.data[kind]).replace("\n", "")
        if len(encoded) > left or not _is_image(encoded, kind):  # the guest wrote it: a client must not choke on it (H16)
            blocks.append(_text(f"[an {kind} of {len(encoded)} base64 characters left out: too large, or not an image]"))
        else:
            left -= len(encoded)
            blocks.append(ImageContent(data=encoded, mime_type=kind))
    return blocks


def _is_image(encoded: str, kind: str) -> bool:
    try:
        return base64.b64decode(encoded, validate=True).startswith(_IMAGES[kind])
    except ValueError:
        return False


def _fields(result: Result) -> dict[str, Any]:
    """Result's fields as JSON. Images are in the content already; protections are constant for a sandbox and long."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(result), default=dict))
    del fields["protections"]
    for name in ("stdout", "stderr"):
        fields[f"{name}_truncated"] = fields[f"{name}_truncated"] or len(fields[name]) > TEXT_CHARS
        fields[name] = clip(fields[name])
    if fields["error"]:
        fields["error"] = {k: clip(v) for k, v in fields["error"].items()}
    fields["changes"] = fields["changes"][:200]
    fields["results"] = [{**rich, "data": _light(rich["data"])} for rich in fields["results"][:RESULTS]]
    return fields


def _light(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if not k.startswith("image/") and len(json.dumps(v)) <= _KEPT}


def _text(text: str) -> TextContent:
    return TextContent(text=clip(text, 4 * TEXT_CHARS))
