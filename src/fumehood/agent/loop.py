"""One thread, one selector: frames from the host in, frames to the host out, and whatever the agent waits for.

Single-threaded on purpose: PID 1 forks, and fork() in a threaded process copies locks that nobody will release.

Memory is bounded from here (H15): once `OUT_LIMIT` bytes wait for the host, every producer (pipes, sessions, tasks that
read files) stands still until the host has taken most of them. Small answers and signals still pass.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import selectors
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Optional, Protocol

from . import wire

OUT_LIMIT = 1 << 20
RESUME_BELOW = 1 << 18
DEAF_ABOVE = 8 * OUT_LIMIT  # a host that asks and never reads is not listened to either
MESSAGE_CHARS = 4096  # of an error: some have what user code says in them
RECV_BYTES = 1 << 16  # more would be mapped and unmapped for each recv() (mallopt(3), M_MMAP_THRESHOLD)

Task = Generator[Optional["Later"], Any, None]


class Channel(Protocol):
    """A connected stream socket, or what behaves like one."""

    def fileno(self) -> int: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def recv(self, size: int, /) -> bytes: ...
    def send(self, data: bytearray, /) -> int: ...
    def close(self) -> None: ...


class Refused(Exception):
    """The answer to a request is an error: `code` is one of docs/wire.md, `errno` the name of an errno or empty."""

    def __init__(self, code: str, message: str, errno: str = "") -> None:
        super().__init__(message)
        self.error = {"code": code, "message": message[:MESSAGE_CHARS], **({"errno": errno} if errno else {})}


def refusal(e: Exception) -> Refused:
    """What to answer for an exception of the code that served the request."""
    if isinstance(e, Refused):
        return e
    if isinstance(e, OSError):
        code = {errno.ENOENT: "not_found", errno.EEXIST: "exists", errno.EAGAIN: "busy"}.get(e.errno or 0, "file_error")
        return Refused(code, str(e), errno.errorcode.get(e.errno or 0, ""))
    if isinstance(e, ValueError):  # a NUL in a path, a name that no encoding can carry
        return Refused("invalid", str(e))
    return Refused("internal", f"{type(e).__name__}: {e}")


class Later:
    """A value that a task waits for with `value = yield later`. Resolved once; later calls change nothing."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.done = False
        self.value: Any = None
        self.waiter: Task | None = None

    def resolve(self, value: Any) -> None:
        if self.done:
            return
        self.done, self.value = True, value
        if self.waiter is not None:
            self._loop.ready.append((self.waiter, value))


def _is_over(e: OSError) -> bool:
    """Whether the host has left. ENOTCONN: over vsock, from a connection that was reset, as all are after a snapshot."""
    return isinstance(e, ConnectionError) or e.errno == errno.ENOTCONN


class Stream:
    """One exchange with the host. Keeps the rule "exactly one END" and drops what comes after CANCEL or END."""

    def __init__(self, loop: Loop, number: int) -> None:
        self.loop, self.number = loop, number
        self.ended = self.cancelled = False
        self.on_data: Callable[[int, bytes], None] | None = None
        self.on_close: Callable[[], None] | None = None
        self.on_cancel: Callable[[], None] = lambda: self.end({})
        self.last_event: Callable[[], dict[str, Any]] | None = None  # told just before END, to one who cancelled, too
        self.outlives_host = False  # what it stands for goes on when the connection is lost

    def data(self, channel: int, data: bytes) -> None:
        if not self.ended and not self.cancelled:
            self.loop.send(wire.encode(self.number, wire.DATA, bytes([channel]) + data))

    def event(self, value: dict[str, Any]) -> None:
        if not self.ended and not self.cancelled:
            self.loop.send(wire.encode_json(self.number, wire.EVENT, value))

    def end(self, ok: dict[str, Any]) -> None:
        self._end({"ok": ok})

    def fail(self, e: Exception) -> None:
        self._end({"error": refusal(e).error})

    def _end(self, value: dict[str, Any]) -> None:
        if not self.ended:
            end = wire.encode_json(self.number, wire.END, value)  # first: of what is too large an error is the end
            self.ended = True
            self.loop.streams.pop(self.number, None)
            if self.last_event is not None:
                self.loop.send(wire.encode_json(self.number, wire.EVENT, self.last_event()))
            self.loop.send(end)

    @contextmanager
    def answering(self) -> Generator[None, None, None]:
        """Turns an exception of the block into this stream's END."""
        try:
            yield
        except Exception as e:
            self.fail(e)

    def task(self, steps: Task) -> None:
        """Runs `steps` while the host keeps up and until the stream ends."""
        self.loop.start(self._guarded(steps))

    def _guarded(self, steps: Task) -> Task:
        with self.answering():
            value: Any = None
            while not self.ended:
                try:
                    wanted = steps.send(value)
                except StopIteration:
                    return
                value = yield wanted
        steps.close()


class _Watch:
    def __init__(self) -> None:
        self.read: Callable[[], None] | None = None
        self.write: Callable[[], None] | None = None
        self.producer = False
        self.mask = 0


class Loop:
    def __init__(self, on_open: Callable[[Stream, dict[str, Any]], None], on_greet: Callable[[str | None], None]) -> None:
        """Nobody is served until attach()."""
        self._on_open, self._on_greet = on_open, on_greet
        # What to do when the host has gone; None: the loop ends, and nobody comes back.
        self.on_gone: Callable[[], None] | None = None
        self.streams: dict[int, Stream] = {}
        self.ready: deque[tuple[Task, Any]] = deque()
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._decoder, self._out = wire.Decoder(), bytearray()
        self._last_stream = -1  # -1: the host has not said HELLO
        self.full = self.closed = False
        self._channel: Channel | None = None

    # -- what the rest of the agent calls
    def attach(self, channel: Channel) -> None:
        """Serve this host from now on. It knows of no stream that an earlier one has opened."""
        self._detach()
        channel.setblocking(False)
        self._channel, self._last_stream = channel, -1
        self.reading(channel.fileno(), self._receive, producer=False)

    def send(self, frame: bytes) -> None:
        if self._channel is None:
            return
        self._out += frame
        if len(self._out) >= OUT_LIMIT and not self.full:
            self._throttle(True)

    def start(self, task: Task) -> None:
        self.ready.append((task, None))

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), callback))

    def reading(self, fd: int, callback: Callable[[], None] | None, producer: bool = True) -> None:
        """`callback` whenever fd is readable, until None. A producer rests while the host does not keep up."""
        watch = self._watches.setdefault(fd, _Watch())
        watch.read, watch.producer = callback, producer
        self._arm(fd, watch)

    def writing(self, fd: int, callback: Callable[[], None] | None) -> None:
        watch = self._watches.setdefault(fd, _Watch())
        watch.write = callback
        self._arm(fd, watch)

    def forget(self, fd: int) -> None:
        """To be called before fd is closed: its number may come back as another file."""
        self.reading(fd, None)
        self.writing(fd, None)

    def run(self) -> None:
        """Until the host closes the channel, unless on_gone is set. Raises wire.BadFrame if the host breaks the protocol."""
        while not self.closed:
            self._flush()
            for key, mask in self._selector.select(self._patience()):
                self._call(key.fd, key.data, mask)
            self._ring()
            self._step()

    # -- how it works
    def _detach(self) -> None:
        if self._channel is None:
            return
        self.forget(self._channel.fileno())
        self._channel.close()
        self._channel, self._decoder, self._out = None, wire.Decoder(), bytearray()
        for stream in list(self.streams.values()):
            if not stream.outlives_host:
                self._cancel(stream)
            stream.ended = True
        self.streams.clear()
        self._throttle(False)

    def _gone(self) -> None:
        if self.on_gone is None:
            self.closed = True
        else:
            self._detach()
            self.on_gone()

    def _arm(self, fd: int, watch: _Watch) -> None:
        reads = watch.read is not None and not (watch.producer and self.full)
        mask = (selectors.EVENT_READ if reads else 0) | (selectors.EVENT_WRITE if watch.write else 0)
        if mask != watch.mask:
            # Mask 0 must leave the selector: epoll reports a hang-up even to those who asked for nothing.
            if watch.mask:
                self._selector.unregister(fd)
            if mask:
                self._selector.register(fd, mask, watch)
            watch.mask = mask
        if watch.read is None and watch.write is None:
            self._watches.pop(fd, None)

    def _throttle(self, full: bool) -> None:
        self.full = full
        for fd, watch in list(self._watches.items()):
            self._arm(fd, watch)

    def _patience(self) -> float | None:
        if self.ready and not self.full:
            return 0
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _call(self, fd: int, watch: _Watch, mask: int) -> None:
        # An earlier callback of this round may have closed fd, and its number may be another file by now.
        if mask & selectors.EVENT_READ and watch.read and self._watches.get(fd) is watch:
            watch.read()
        if mask & selectors.EVENT_WRITE and watch.write and self._watches.get(fd) is watch:
            watch.write()

    def _ring(self) -> None:
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _step(self) -> None:
        """One step of each ready task, so that streams interleave."""
        for _ in range(len(self.ready)):
            if self.full:
                return
            task, value = self.ready.popleft()
            try:
                wanted = task.send(value)
            except StopIteration:
                continue
            if wanted is None or wanted.done:
                self.ready.append((task, wanted.value if wanted else None))
            else:
                wanted.waiter = task

    def _flush(self) -> None:
        if self._channel is None:
            return
        try:
            while self._out:
                del self._out[: self._channel.send(self._out[:RECV_BYTES])]
        except BlockingIOError:
            pass
        except OSError as e:
            if not _is_over(e):
                raise
            self._gone()
            return
        if self.full and len(self._out) <= RESUME_BELOW:
            self._throttle(False)
        self.writing(self._channel.fileno(), self._flush if self._out else None)
        self.reading(self._channel.fileno(), None if len(self._out) > DEAF_ABOVE else self._receive, producer=False)

    def _receive(self) -> None:
        if self._channel is None:
            return
        try:
            data = self._channel.recv(RECV_BYTES)
        except BlockingIOError:
            return
        except OSError as e:
            if not _is_over(e):
                raise
            data = b""
        if not data:
            self._gone()
        for frame in self._decoder.feed(data):
            self._accept(frame)

    def _accept(self, frame: wire.Frame) -> None:
        if frame.kind == wire.HELLO:
            self._shake_hands(frame.json())
        elif frame.kind == wire.OPEN:
            self._open(frame)
        elif frame.kind in (wire.EVENT, wire.END):
            raise wire.BadFrame(f"a frame of kind {frame.kind} from the host")
        elif frame.stream in self.streams:  # else it crossed our END
            self._pass_on(self.streams[frame.stream], frame)

    def _shake_hands(self, hello: dict[str, Any]) -> None:
        if hello.get("generation") != wire.GENERATION:
            raise wire.BadFrame(f"a HELLO of generation {hello.get('generation')!r:.20}")
        greet = hello.get("greet")
        if self.on_gone is not None and self._channel is not None and isinstance(greet, str):
            self.attach(self._channel)
        elif self._last_stream >= 0:
            raise wire.BadFrame("an unexpected HELLO")
        self._last_stream = 0
        if self.on_gone is not None:
            self._on_greet(greet if isinstance(greet, str) else None)

    def _open(self, frame: wire.Frame) -> None:
        if not 0 <= self._last_stream < frame.stream:
            raise wire.BadFrame("OPEN before HELLO, or a stream id that does not grow")
        self._last_stream = frame.stream
        stream = self.streams[frame.stream] = Stream(self, frame.stream)
        with stream.answering():
            self._on_open(stream, frame.json())

    def _pass_on(self, stream: Stream, frame: wire.Frame) -> None:
        with stream.answering():
            if frame.kind == wire.DATA and stream.on_data:
                stream.on_data(frame.payload[0], frame.payload[1:])
            elif frame.kind == wire.CLOSE and stream.on_close:
                stream.on_close()
            elif frame.kind == wire.CANCEL:
                self._cancel(stream)

    def _cancel(self, stream: Stream) -> None:
        with stream.answering():
            stream.cancelled = True
            stream.on_cancel()
