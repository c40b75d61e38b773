"""One execution: follow its stream under a deadline and caps, stop it when one is passed, and say what it came to."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from fumehood.agent import wire
from fumehood.errors import Detached, FumehoodError, InvalidInput, SandboxGone, WireError
from fumehood.model import CodeError, FileChange, Limits, RichResult
from fumehood.outcome import Ended
from fumehood.runtime.link import Link, Stream

# A run that does not end this long after its cancellation takes the whole sandbox along, so that "timeout" means the
# stated deadline to within a quarter of a second, whatever the guest does (H17). Times Handle.grace, where guests are emulated.
STOP_GRACE_S = 0.2
# Nobody waits for a run whose caller went away: on a busy machine its sandbox, with all its state, is worth a longer try.
LEFT_GRACE_S = 2.0
_MAX_RESULTS, _MAX_RESULT_BYTES, _MAX_CHANGES = 256, 64 << 20, 1_000
_ITEM_BYTES = 64  # what a value takes once parsed: results of 3 bytes each, `{},`, must not take 25 times their text
MAX_CODE_BYTES = 4 << 20
_STREAMS = {wire.STDOUT: "stdout", wire.STDERR: "stderr", wire.TERMINAL: "stdout"}


class OutputOverflow(Exception):
    """The stream carried more than `output_kill_bytes`."""


@dataclass
class Sinks:
    """Called as things arrive: `output(name, text)`, name stdout or stderr; `result(RichResult)`.

    `room()` is awaited before more is read: a slow listener slows the program, and the host holds no more for it (H15).
    """

    output: Callable[[str, str], None] | None = None
    result: Callable[[RichResult], None] | None = None
    room: Callable[[], Awaitable[None]] | None = None


@dataclass
class Capture:
    """Bounded memory of one execution, whatever arrives (H15)."""

    limits: Limits
    sinks: Sinks
    kept: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})
    truncated: set[str] = field(default_factory=set[str])
    results: list[RichResult] = field(default_factory=list[RichResult])
    error: CodeError | None = None
    execution_count: int | None = None
    pid: int | None = None
    account: Mapping[str, Any] = field(default_factory=dict[str, Any])  # the guest's kernel's word, if it has one
    _total_bytes: int = 0
    _result_bytes: int = 0

    def __post_init__(self) -> None:
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self.kept}

    def take(self, frame: wire.Frame, link: Link) -> None:
        if frame.kind == wire.DATA:
            self._output(_STREAMS.get(frame.payload[0], "stdout"), frame.payload[1:])
        else:
            self._event(link.checked_json(frame), len(frame.payload) + _ITEM_BYTES * wire.json_items(frame.payload))

    def _output(self, name: str, data: bytes) -> None:
        self._total_bytes += len(data)
        if self._total_bytes > self.limits.output_kill_bytes:
            raise OutputOverflow
        room = self.limits.output_bytes - len(self.kept[name])
        self.kept[name] += data[:room]
        if len(data) > room:
            self.truncated.add(name)
        if self.sinks.output is not None and (text := self._decoders[name].decode(data)):
            self.sinks.output(name, text)

    def _event(self, event: dict[str, Any], size: int) -> None:
        match event.get("type"):
            case "result" if data := wire.table(event.get("data")):
                self._result_bytes += size
                if len(self.results) >= _MAX_RESULTS or self._result_bytes > _MAX_RESULT_BYTES:
                    self.truncated.add("results")
                    return
                result = RichResult(data, bool(event.get("is_main_result")))
                self.results.append(result)
                if self.sinks.result is not None:
                    self.sinks.result(result)
            case "error":
                self.error = CodeError(*(str(event.get(k, ""))[:cap] for k, cap in _ERROR_CAPS.items()))
            case "count" if (count := _number(event.get("execution_count"))) is not None:
                self.execution_count = count
            case "account":
                self.account = event
            case "started" if (pid := _number(event.get("pid"))) is not None:
                self.pid = pid
            case _:
                pass  # a later generation's event, or noise: neither may harm

    def text(self, name: str) -> str:
        return self.kept[name].decode("utf-8", "replace")


_ERROR_CAPS = {"name": 256, "value": 65_536, "traceback": 1 << 20}


@dataclass
class Followed:
    """How a stream ended. `end` is the agent's word (END's ok object), empty when there was none."""

    ended: Ended
    capture: Capture
    started_at: float
    execute_s: float = 0.0
    end: dict[str, Any] = field(default_factory=dict[str, Any])
    gone_because: str = ""

    def number(self, key: str) -> int | None:
        return _number(self.end.get(key))

    def changes(self) -> tuple[FileChange, ...]:
        rows = self.end.get("changed")
        tables = [wire.table(row) for row in cast("list[object]", rows)[:_MAX_CHANGES]] if isinstance(rows, list) else []
        return tuple(
            FileChange(str(row.get("path")), row["kind"], _number(row.get("size")) or 0)
            for row in tables
            if row.get("kind") in ("created", "modified", "removed")
        )


def _number(value: object) -> int | None:
    """One that every language has: JSON allows thousands of digits."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53 else None


async def follow(
    link: Link, stream: Stream, verb: str, capture: Capture, timeout_s: float, kill: Callable[[str], Any], grace: float = 1.0
) -> Followed:
    """Until END, the deadline, a cap or the sandbox's end. `kill(cause)` ends the sandbox when the run can't be stopped;
    `grace`: how many times longer than usual it may take to (Handle.grace)."""
    done, is_program = Followed("end", capture, time.monotonic()), verb == "exec.start"
    try:
        async with asyncio.timeout(timeout_s):
            async for frame in stream:
                capture.take(frame, link)
                if capture.sinks.room is not None:
                    await capture.sinks.room()
        done.end = stream.ok
    except TimeoutError:
        done.ended = "timeout"
    except OutputOverflow:
        done.ended = "output_limit"
    except (SandboxGone, Detached) as e:
        done.ended, done.gone_because = "gone", e.cause
    except WireError as e:  # whoever forges frames loses its sandbox, and only that (H16)
        done.ended, done.gone_because = "gone", str(e)
        await kill(done.gone_because)
    except asyncio.CancelledError:
        await asyncio.shield(_stop(link, stream, capture, kill, is_program, LEFT_GRACE_S))
        raise
    if done.ended in ("timeout", "output_limit"):
        await _stop(link, stream, capture, kill, is_program, STOP_GRACE_S * grace)
        done.end = stream.ok  # what was changed until then is still the caller's
    done.execute_s = time.monotonic() - done.started_at
    return done


async def _find_pid(link: Link, stream: Stream, capture: Capture) -> None:
    """A program that was asked for starts, though nobody has heard of it yet: CANCEL would let it go on unseen."""
    async for frame in stream:
        if frame.kind == wire.EVENT and (event := link.checked_json(frame)).get("type") == "started":
            capture.pid = _number(event.get("pid"))
            return


async def _stop(
    link: Link, stream: Stream, capture: Capture, kill: Callable[[str], Any], is_program: bool, grace_s: float
) -> None:
    try:
        async with asyncio.timeout(grace_s):
            if is_program and capture.pid is None:
                await _find_pid(link, stream, capture)
            if capture.pid is not None:
                await link.call("exec.signal", pid=capture.pid, signal=9, group=True)
            else:
                await stream.cancel()
            await stream.result()
    except TimeoutError:
        await kill("it did not stop when told to")
    except FumehoodError as e:
        if e.code not in ("not_found", "sandbox_gone", "detached"):  # those: it ended in the meantime
            raise
    finally:
        stream.abandon()


async def feed(stream: Stream, data: bytes | None) -> None:
    """Its whole input. None: it has none."""
    if data is not None:
        with contextlib.suppress(SandboxGone, Detached):  # whoever follows the stream is told
            await stream.send(data)
            await stream.close_input()


def check_code(code: str) -> None:
    """Raises InvalidInput."""
    size = len(code.encode("utf-8", "surrogatepass"))
    if size > MAX_CODE_BYTES:
        raise InvalidInput(
            f"the code has {size} bytes",
            cause=f"the limit is {MAX_CODE_BYTES}",
            remediation="write data to a file with files.write() and read it in the code",
        )
    if "\0" in code:
        raise InvalidInput("the code has a NUL byte", remediation="remove it: no language here accepts one")
