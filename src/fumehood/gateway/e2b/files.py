"""GET and POST /files: streamed both ways; no byte of a file rests on the host."""

from __future__ import annotations

import base64
import hashlib
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fumehood.errors import FumehoodError
from fumehood.gateway.call import leave
from fumehood.gateway.pour import BrokenOff, pour
from fumehood.gateway.writing import Writing
from fumehood.lease import Lease

from .answers import Refusal, gone, json_answer, refused, status_of
from .call import Call, check_user, same
from .connect import Fault
from .form import Form

_INFLATE_BYTES = 1 << 18  # what one step of decompression may make, whatever a bomb promises (H15)
_GZIP = 31


def check_signature(request: Request, leases: list[Lease]) -> Lease:
    """The lease whose token made the URL's signature. A signature is over path, verb, user and expiry. Raises Refusal 401."""
    query = request.query_params
    expiry = query.get("signature_expiration")
    verb = "read" if request.method == "GET" else "write"
    words = [query.get("path", ""), verb, query.get("username", "")]
    shown, found = query.get("signature", ""), None
    for lease in leases:
        raw = ":".join([*words, lease.token, *([expiry] if expiry is not None else [])])
        digest = hashlib.sha256(raw.encode("utf-8", "surrogateescape")).digest()
        if same(shown, "v1_" + base64.b64encode(digest).rstrip(b"=").decode()):
            found = lease
    if found is None:
        raise Refusal(401, "invalid signature")
    if expiry is not None and not (expiry.isascii() and expiry.isdigit() and int(expiry[:20]) > time.time()):
        raise Refusal(401, "signature is already expired")
    return found


async def serve(call: Call, scope: Scope, receive: Receive, send: Send) -> None:
    answer: Response | None
    try:
        _check_user(call.request)
        if call.request.method == "GET":
            answer = await _download(call, scope, receive, send)
        elif call.request.method == "POST":
            answer = json_answer(await _upload(call))
        else:
            answer = refused(Refusal(405, "only GET and POST"))
    except Refusal as e:
        answer = refused(e)
    except FumehoodError as e:
        answer = gone(call.lease.id) if call.lease.ended.is_set() else refused(Refusal(status_of(e), e.message))
    if answer is not None:
        await answer(scope, receive, send)


def _check_user(request: Request) -> None:
    try:
        check_user(request.query_params.get("username", ""))
    except Fault as e:
        raise Refusal(401, e.message) from None


def _path(request: Request) -> str:
    path = request.query_params.get("path", "")
    if not path or "\0" in path:
        raise Refusal(400, "the query needs a path")
    return path


async def _download(call: Call, scope: Scope, receive: Receive, send: Send) -> Response | None:
    """Up to the first bytes a failure is an answer of its own; after them it breaks the connection off."""
    stream = await call.link.open("files.read", path=_path(call.request))
    try:
        try:
            first = (await anext(stream)).payload[1:]
        except StopAsyncIteration:
            return Response(b"", media_type="application/octet-stream")

        async def rest() -> AsyncGenerator[bytes, None]:
            yield first
            try:
                async for frame in stream:
                    yield frame.payload[1:]
            except FumehoodError as e:
                raise BrokenOff from e

        await pour(scope, receive, send, "application/octet-stream", rest(), call.lease.ended)
        return None
    finally:
        await leave(stream)


async def _upload(call: Call) -> list[dict[str, Any]]:
    headers = call.request.headers
    if any(name.lower().startswith("x-metadata-") for name in headers):
        raise Refusal(400, "file metadata is not kept by this server; write the file without it (docs/e2b.md)")
    kind, options = parse_options_header(headers.get("content-type"))
    pieces = _inflated(call.request.stream(), headers.get("content-encoding", "identity"), call.service.config.max_upload_bytes)
    if kind == b"multipart/form-data":
        return await _parts(call, pieces, options.get(b"boundary", b""))
    if kind != b"application/octet-stream":
        raise Refusal(400, "the content type must be multipart/form-data or application/octet-stream")
    writing = await Writing(call.link, _path(call.request)).open()
    try:
        async for piece in pieces:
            await writing.write(piece)
        return [_written(await writing.finish())]
    finally:
        await writing.abandon()


async def _inflated(chunks: AsyncIterator[bytes], encoding: str, limit_bytes: int) -> AsyncIterator[bytes]:
    if encoding == "identity":
        async for chunk in chunks:
            if chunk:
                yield chunk
        return
    if encoding != "gzip":
        raise Refusal(415, "the content encoding must be gzip or identity")
    inflater, made = zlib.decompressobj(_GZIP), 0
    async for chunk in chunks:
        while chunk and not inflater.eof:
            try:
                piece = inflater.decompress(chunk, _INFLATE_BYTES)
            except zlib.error:
                raise Refusal(400, "the body is not gzip") from None
            chunk, made = inflater.unconsumed_tail, made + len(piece)
            if made > limit_bytes:
                raise Refusal(413, f"the body is over {limit_bytes} bytes when it is unpacked")
            yield piece
    if not inflater.eof or inflater.unused_data:
        raise Refusal(400, "the gzip body is cut short or has something after its end")


async def _parts(call: Call, pieces: AsyncIterator[bytes], boundary: bytes) -> list[dict[str, Any]]:
    """Each part's filename is the whole path, but for a single file with a path in the query."""
    form, written = Form(boundary), list[dict[str, Any]]()
    asked, writing = call.request.query_params.get("path", ""), None
    try:
        async for piece in pieces:
            for kind, data in form.feed(piece):
                if kind == "file":
                    if asked and written:
                        raise Refusal(400, "with a path in the query there can be one file")
                    writing = await Writing(call.link, asked or data.decode("utf-8", "surrogateescape")).open()
                elif kind == "data" and writing:
                    await writing.write(data)
                elif kind == "end" and writing:
                    written.append(_written(await writing.finish()))
                    await writing.abandon()
                    writing = None
    finally:
        if writing:
            await writing.abandon()
    form.finish()
    return written


def _written(entry: dict[str, Any]) -> dict[str, Any]:
    return {"path": entry.get("path"), "name": entry.get("name"), "type": "file"}
