"""What a model gets to read: bounded text, images as images, every field in the structured part, errors that say what to do."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent

from fumehood.client import told
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.model import KIB, Result

_BINARY_BYTES = 64 * KIB


def from_result(result: Result) -> CallToolResult:
    """A program that failed is an answer like any other, marked as an error so that the model looks at why."""
    blocks = [_block(part) for part in told.parts(result)]
    return CallToolResult(content=blocks, structured_content=_fields(result), is_error=not result.ok)


def from_error(error: FumehoodError) -> CallToolResult:
    fields = {k: v for k, v in error.to_dict().items() if k != "details"}
    lines = [f"{error.code}: {told.clip(error.message, KIB)}"]
    lines += [f"{name}: {told.clip(fields[name], KIB)}" for name in ("cause", "remediation") if fields[name]]
    lines += ["retryable: the same call may work later"] if error.retryable else []
    return CallToolResult(content=[_text("\n".join(lines))], structured_content={"error": fields}, is_error=True)


def from_fields(fields: Mapping[str, Any], text: str | None = None) -> CallToolResult:
    shown = text if text is not None else json.dumps(fields, indent=1)
    return CallToolResult(content=[_text(shown)], structured_content=dict(fields))


def from_file(path: str, data: bytes) -> CallToolResult:
    """A picture as a picture, UTF-8 as text, anything else as base64 in the structured part. Raises InvalidInput."""
    fields: dict[str, Any] = {"path": path, "size_bytes": len(data)}
    kind = next((mime for mime, magic in told.IMAGES.items() if data.startswith(magic)), None)
    if kind is not None:
        image = ImageContent(data=base64.b64encode(data).decode(), mime_type=kind)
        return CallToolResult(content=[image], structured_content={**fields, "mime_type": kind})
    try:
        return CallToolResult(content=[_text(data.decode())], structured_content=fields)
    except UnicodeDecodeError:
        if len(data) > _BINARY_BYTES:
            raise InvalidInput(
                f"{path} is {len(data)} bytes of binary data",
                cause=f"more than {_BINARY_BYTES} bytes would not help a model",
                remediation="look at it with run_code",
            ) from None
    return from_fields({**fields, "base64": base64.b64encode(data).decode()}, f"{len(data)} bytes that are not UTF-8 text")


def _fields(result: Result) -> dict[str, Any]:
    """Result's fields as JSON. Images are in the content already; protections are constant for a sandbox and long."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(result), default=dict))
    del fields["protections"]
    for name in ("stdout", "stderr"):
        fields[f"{name}_truncated"] = fields[f"{name}_truncated"] or len(fields[name]) > told.TEXT_CHARS
        fields[name] = told.clip(fields[name])
    if fields["error"]:
        fields["error"] = {k: told.clip(v) for k, v in fields["error"].items()}
    fields["changes"] = fields["changes"][:200]
    fields["results"] = [{**rich, "data": told.without_images(rich["data"])} for rich in fields["results"][: told.RESULTS]]
    return fields


def _block(part: told.Part) -> ContentBlock:
    return _text(part[1]) if part[0] == "text" else ImageContent(mime_type=part[1], data=part[2])


def _text(text: str) -> TextContent:
    return TextContent(text=told.clip(text, 4 * told.TEXT_CHARS))
