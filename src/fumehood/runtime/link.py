"""The host's end of the channel: many streams over one connection. All that arrives is the guest's, so hostile input."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from typing import Any

from fumehood.agent import wire
from fumehood.errors import (
    AgentUnresponsive,
    Detached,
    FileFault,
    FumehoodError,
    InvalidInput,
    NotFound,
    PolicyError,
    SandboxGone,
    SetupFailed,
    WireError,
)

# Above this the unread frames of all streams stop the reading of the whole channel, so that a flood meets the kernel's socket
# buffer and then blocks its author: a sandbox can make the host hold this much and no more (H15).
_BUFFERED_BYTES = 8 << 20
_FRAME_BYTES = 256  # what an unread frame costs beside its payload: eight million frames of a byte are no 8 MiB
_CALL_TIMEOUT_S = 60
_ERRORS: dict[str, type[FumehoodError]] = {
    "invalid": InvalidInput,
    "unsupported": InvalidInput,
    "exists": FileFault,
    "file_error": FileFault,
    "not_found": NotFound,
}


class Stream:
    """One exchange. Iterate for DATA and EVENT frames; then `ok` holds the END. Raises what END's error stands for."""

    def __init__(self, link: Link, number: int) -> None:
        self._link, self.number = link, number
        self._frames: collections.deque[wire.Frame] = collections.deque()
        self._arrived = asyncio.Event()
        self.buffered_bytes, self._ended = 0, False
        self.ok: dict[str, Any] = {}

    def _push(self, frame: wire.Frame) -> None:
        self._frames.append(frame)
        self.buffered_bytes += _FRAME_BYTES + len(frame.payload)
        self._arrived.set()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> wire.Frame:
        while not self._frames and not self._ended:
            if self._link.lost:
                raise self._link.over()
            self._arrived.clear()
            await self._arrived.wait()
        if self._ended:
            raise StopAsyncIteration
        frame = self._frames.popleft()
        self.buffered_bytes -= _FRAME_BYTES + len(frame.payload)
        self._link.room()
        if frame.kind != wire.END:
            return frame
        self._finish(self._link.checked_json(frame))
        raise StopAsyncIteration

    def _finish(self, end: dict[str, Any]) -> None:
        self._ended = True
        self._link.forget(self.number)
        if "error" in end:
            raise _error(wire.table(end["error"]))
        self.ok = wire.table(end.get("ok"))

    async def result(self) -> dict[str, Any]:
        """Drain the stream, return END's ok object."""
        async for _ in self:
            pass
        return self.ok

    async def send(self, data: bytes, channel: int = wire.STDIN) -> None:
        for start in range(0, len(data), wire.CHUNK_BYTES):
            payload = bytes([channel]) + data[start : start + wire.CHUNK_BYTES]
            await self._link.send(wire.encode(self.number, wire.DATA, payload))

    async def close_input(self) -> None:
        await self._link.send(wire.encode(self.number, wire.CLOSE))

    async def cancel(self) -> None:
        if not self._ended:
            await self._link.send(wire.encode(self.number, wire.CANCEL))

    def abandon(self) -> None:
        """Stop following without a word: late frames of the stream are dropped."""
        self._ended = True
        self._link.forget(self.number)


def setup_failure(data: bytes) -> FumehoodError:
    """What a sandbox said instead of going on: a HELLO frame, if it could still speak."""
    try:
        return _setup_failed(wire.Decoder().feed(data)[0].json())
    except (wire.BadFrame, IndexError):
        return SetupFailed("the sandbox could not be set up", cause="it ended without a word")


def _setup_failed(hello: dict[str, Any]) -> FumehoodError:
    failed = wire.table(hello.get("setup_failed"))
    cause, step = str(failed.get("message"))[:4096], str(failed.get("step"))[:64]
    if step == "file-rules":  # the only step that does what its caller asked for
        said = "what the policy says of files can't hold (step file-rules)"
        return PolicyError(said, cause=cause, remediation="correct files of the policy")
    return SetupFailed(f"step {step} of the recipe failed", cause=cause)


def _error(error: dict[str, Any]) -> FumehoodError:
    code, message = str(error.get("code")), str(error.get("message"))[:4096]
    details = {"errno": str(error["errno"])[:32]} if "errno" in error else {}
    return _ERRORS.get(code, FumehoodError)(message, cause=f"the agent answered {code[:32]}", **details)


class Link:
    """Owns the connection to one agent. `lost` is empty while it lives, else says why it is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._streams, self._next = dict[int, Stream](), 1
        self._space, self._sending = asyncio.Event(), asyncio.Lock()
        self._space.set()
        self._task: asyncio.Task[None] | None = None
        self.lost, self.detached = "", False

    async def start(self, timeout_s: float, *, greeted: bool = False) -> None:
        """Exchange HELLO; `greeted`: ours is said. If not, it waits: written to a sandbox that has just ended it would cost the
        last words that are there to be read. Raises AgentUnresponsive, SetupFailed, WireError or SandboxGone."""
        try:
            async with asyncio.timeout(timeout_s):
                frame = await self._read()
        except TimeoutError:
            raise AgentUnresponsive(f"the agent said nothing within {timeout_s} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise SandboxGone("the sandbox ended before its agent spoke") from None
        if frame.kind != wire.HELLO:
            raise WireError("the agent's first frame is not HELLO")
        hello = self.checked_json(frame)  # not kept: a guest's that was taken over may be 100 MB of objects (H15)
        if "setup_failed" in hello:
            raise _setup_failed(hello)
        generation = hello.get("generation")
        if not isinstance(generation, int) or generation < wire.GENERATION:
            raise WireError(f"the agent speaks generation {generation!r:.20}, this host needs {wire.GENERATION}")
        if not greeted:
            await self.send(wire.GREETING)
        self._task = asyncio.create_task(self._receive())

    async def open(self, verb: str, **arguments: Any) -> Stream:
        if self.lost:
            raise self.over()
        stream = self._streams[self._next] = Stream(self, self._next)
        self._next += 1
        await self.send(wire.encode_json(stream.number, wire.OPEN, {"verb": verb, **arguments}))
        return stream

    async def call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """A stream of which only the end matters. Raises AgentUnresponsive after a minute, as in a paused sandbox."""
        stream = await self.open(verb, **arguments)
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await stream.result()
        except TimeoutError:
            raise AgentUnresponsive(f"{verb} was not answered within {_CALL_TIMEOUT_S} s") from None
        finally:
            stream.abandon()

    async def send(self, frame: bytes) -> None:
        try:
            async with self._sending:
                self._writer.write(frame)
                await self._writer.drain()
        except (ConnectionError, RuntimeError) as e:
            self.lose(f"the channel broke: {e}")
            raise self.over() from None

    def checked_json(self, frame: wire.Frame) -> dict[str, Any]:
        try:
            return frame.json()
        except wire.BadFrame as e:
            raise WireError("the agent broke the protocol", cause=str(e)) from None

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)
        self.room()

    def room(self) -> None:
        if sum(s.buffered_bytes for s in self._streams.values()) < _BUFFERED_BYTES:
            self._space.set()

    async def _read(self) -> wire.Frame:
        try:
            length, stream, kind = wire.parse_header(await self._reader.readexactly(wire.HEADER_BYTES))
        except wire.BadFrame as e:
            raise WireError("the agent broke the protocol", cause=str(e)) from None
        return wire.Frame(stream, kind, await self._reader.readexactly(length) if length else b"")

    async def _receive(self) -> None:
        try:
            while True:
                frame = await self._read()
                if frame.kind not in (wire.DATA, wire.EVENT, wire.END):
                    raise WireError(f"the agent sent a frame of kind {frame.kind}")
                if (stream := self._streams.get(frame.stream)) is None:
                    continue
                stream._push(frame)  # pyright: ignore[reportPrivateUsage]
                self._space.clear()
                self.room()
                await self._space.wait()
        except WireError as e:
            self.lose(f"{e.message}: {e.cause}")
        except (asyncio.IncompleteReadError, ConnectionError):
            self.lose("the agent's end of the channel closed")

    def lose(self, why: str) -> None:
        """Who waits for a frame is told. Needed where no reading finds the end: unread frames of another stream stop it."""
        self.lost = self.lost or why
        self._writer.close()
        for stream in self._streams.values():
            stream._arrived.set()  # pyright: ignore[reportPrivateUsage]

    def detach(self, why: str) -> None:
        """The sandbox goes on without it: who uses it must ask again. What is unsent is dropped: a paused one reads nothing."""
        self.detached = self.detached or not self.lost
        self.lose(why)
        self._writer.transport.abort()

    def over(self) -> FumehoodError:
        if self.detached:
            return Detached("the connection to the sandbox was cut", cause=self.lost, remediation="ask again: it goes on")
        return SandboxGone("the sandbox ended", cause=self.lost, remediation="create a new sandbox")

    async def aclose(self) -> None:
        self.lose("closed by its owner")
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
