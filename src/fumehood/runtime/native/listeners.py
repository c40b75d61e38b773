"""The seccomp listeners of one sandbox in the supervisor's loop: fetch each as it is announced, serve it, drop it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from fumehood.events import Event
from fumehood.runtime.native.notify import Listener, read_announcement, take_listener
from fumehood.runtime.native.peek import Destination

_RETRY_S, _TRIES = 0.001, 2_000


class Listeners:
    """Owns the announcement socket and every listener. While this is closed, a new process can't start: it fails closed."""

    def __init__(
        self, announcements: socket.socket, sandbox_id: str, refused: Callable[[bytes], int], on_event: Callable[[Event], None]
    ) -> None:
        self._announcements, self._sandbox_id, self._refused, self._on_event = announcements, sandbox_id, refused, on_event
        self._loop = asyncio.get_running_loop()
        self._listeners: set[Listener] = set()
        self._closed = False
        # One thread for each sandbox, started by its first connect: who blocks it makes nobody wait but itself.
        self._looking = ThreadPoolExecutor(1, "fumehood-look")
        self._loop.add_reader(announcements.fileno(), self._announced)

    def _announced(self) -> None:
        while announced := read_announcement(self._announcements):
            self._take(*announced, _TRIES)

    def _take(self, pid: int, number: int, tries: int) -> None:
        if self._closed:
            return
        try:
            fd = take_listener(pid, number)
        except ProcessLookupError:
            return
        if fd is not None:
            listener = Listener(fd, self._sandbox_id, self._refused, self._on_event, aside=self._aside)
            self._listeners.add(listener)
            self._loop.add_reader(fd, self._serve, listener)
        elif tries:
            self._loop.call_later(_RETRY_S, self._take, pid, number, tries - 1)

    def _aside(self, look: Callable[[], list[Destination]], then: Callable[[list[Destination]], None]) -> None:
        def found(future: Future[list[Destination]]) -> None:
            if not future.cancelled():
                self._loop.call_soon_threadsafe(then, future.result())

        with suppress(RuntimeError):  # the interpreter is at its end: no thread any more, and soon no sandbox
            self._looking.submit(look).add_done_callback(found)

    def _serve(self, listener: Listener) -> None:
        if not listener.handle():
            self._drop(listener)

    def _drop(self, listener: Listener) -> None:
        self._loop.remove_reader(listener.fileno())
        self._listeners.discard(listener)
        listener.close()

    def close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._announcements.fileno())
        self._announcements.close()
        self._looking.shutdown(wait=False, cancel_futures=True)
        for listener in list(self._listeners):
            self._drop(listener)
