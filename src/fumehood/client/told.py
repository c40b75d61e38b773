"""A Result in words and pictures, bounded, for a reader who pays for each of them: a model."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fumehood.model import KIB, MIB, Result

TEXT_CHARS = 32 * KIB  # of each text: a context window is not a log file
IMAGE_CHARS, RESULTS = 4 * MIB, 16  # base64 of all images; more would cost every later turn of the conversation
IMAGES: Mapping[str, bytes] = {
    "image/png": b"\x89PNG\r\n",
    "image/jpeg": b"\xff\xd8\xff",
    "image/gif": b"GIF8",
    "image/webp": b"RIFF",
}
_TEXTS = ("text/markdown", "text/plain", "text/latex", "application/json")  # the first that is there is shown

Part = tuple[Literal["text"], str] | tuple[Literal["image"], str, str]  # ("text", text) or ("image", MIME type, base64)


def clip(text: str, limit: int = TEXT_CHARS) -> str:
    """Head and tail: errors stand at the end, what it was about at the start."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def parts(result: Result) -> list[Part]:
    """All that a model should see, in order; at least one part."""
    told = story(result)
    shown = list(rich_parts(result))
    return [*([("text", told)] if told else []), *shown] or [("text", "(no output)")]


def story(result: Result) -> str:
    """Status with its cause, refusals, output, traceback. Empty when it was quiet and well."""
    head = [] if result.ok else [f"status: {result.status}" + (f" - {result.cause}" if result.cause else "")]
    if result.exit_code:
        head.append(f"exit code: {result.exit_code}")
    if result.refused_syscalls:
        head.append("refused system calls: " + ", ".join(f"{c.name} x{c.count}" for c in result.refused_syscalls))
    told = [("", "\n".join(head)), ("", result.stdout), ("stderr:\n", result.stderr)]
    if result.error is not None:
        told.append(("", result.error.traceback or f"{result.error.name}: {result.error.value}"))
    return "\n".join(label + clip(text.rstrip("\n")) for label, text in told if text)


def rich_parts(result: Result) -> Iterator[Part]:
    left = IMAGE_CHARS
    for rich in result.results[:RESULTS]:
        kind = next((k for k in IMAGES if k in rich.data), None)
        if kind is None:
            shown = next((rich.data[k] for k in _TEXTS if k in rich.data), None)
            if shown is not None:
                yield "text", clip(shown if isinstance(shown, str) else json.dumps(shown))
            continue
        encoded = str(rich.data[kind]).replace("\n", "")
        if len(encoded) <= left and _is_image(encoded, kind):  # the guest wrote it: no reader must choke on it (H16)
            left -= len(encoded)
            yield "image", kind, encoded
        else:
            yield "text", f"[an {kind} of {len(encoded)} base64 characters left out: too large, or not an image]"


def _is_image(encoded: str, kind: str) -> bool:
    try:
        return base64.b64decode(encoded, validate=True).startswith(IMAGES[kind])
    except ValueError:
        return False


def without_images(data: Mapping[str, Any], limit: int = 64 * KIB) -> dict[str, Any]:
    """A rich result's data but for what is an image or longer than `limit` as JSON."""
    return {k: v for k, v in data.items() if not k.startswith("image/") and len(json.dumps(v)) <= limit}
