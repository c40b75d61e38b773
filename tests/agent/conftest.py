"""A real agent in a process of its own, and a small synchronous client."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fumehood.agent import wire

PATIENCE_S = 30.0  # how long a test waits for something that must come


@dataclass
class Answer:
    ok: dict[str, Any] | None
    error: dict[str, Any] | None
    events: list[dict[str, Any]]
    output: dict[int, bytes] = field(default_factory=dict)

    @property
    def stdout(self) -> str:
        return self.output.get(wire.STDOUT, b"").decode()

    @property
    def stderr(self) -> str:
        return self.output.get(wire.STDERR, b"").decode()


class Client:
    def __init__(self, home: Path, process: subprocess.Popen[bytes], channel: socket.socket) -> None:
        self.home, self.process, self.channel = home, process, channel
        channel.settimeout(PATIENCE_S)
        self._decoder, self._last = wire.Decoder(), 0
        self._frames: dict[int, deque[wire.Frame]] = defaultdict(deque)

    def hello(self) -> dict[str, Any]:
        value = self.next(0).json()
        self.channel.sendall(wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION}))
        return value

    def open(self, verb: str, **args: Any) -> int:
        self._last += 1
        self.channel.sendall(wire.encode_json(self._last, wire.OPEN, {"verb": verb, **args}))
        return self._last

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        self.channel.sendall(wire.encode(stream, kind, payload))

    def data(self, stream: int, data: bytes) -> None:
        for start in range(0, len(data), wire.CHUNK_BYTES):
            self.send(stream, wire.DATA, bytes([wire.STDIN]) + data[start : start + wire.CHUNK_BYTES])

    def next(self, stream: int) -> wire.Frame:
        while not self._frames[stream]:
            data = self.channel.recv(1 << 18)
            if not data:
                raise ConnectionError("the agent closed the channel")
            for frame in self._decoder.feed(data):
                self._frames[frame.stream].append(frame)
        return self._frames[stream].popleft()

    def event(self, stream: int, type: str) -> dict[str, Any]:
        """The next EVENT of this type; frames before it are lost."""
        while True:
            frame = self.next(stream)
            assert frame.kind != wire.END, frame
            if frame.kind == wire.EVENT and frame.json()["type"] == type:
                return frame.json()

    def wait_output(self, stream: int, text: bytes, channel: int = wire.STDOUT) -> bytes:
        seen = b""
        while text not in seen:
            frame = self.next(stream)
            assert frame.kind != wire.END, (seen, frame)
            if frame.kind == wire.DATA and frame.payload[0] == channel:
                seen += frame.payload[1:]
        return seen

    def finish(self, stream: int) -> Answer:
        events: list[dict[str, Any]] = []
        output: dict[int, bytearray] = defaultdict(bytearray)
        while (frame := self.next(stream)).kind != wire.END:
            if frame.kind == wire.EVENT:
                events.append(frame.json())
            else:
                output[frame.payload[0]] += frame.payload[1:]
        end = frame.json()
        return Answer(end.get("ok"), end.get("error"), events, {c: bytes(b) for c, b in output.items()})

    def call(self, verb: str, **args: Any) -> Answer:
        return self.finish(self.open(verb, **args))

    def ok(self, verb: str, **args: Any) -> dict[str, Any]:
        answer = self.call(verb, **args)
        assert answer.ok is not None, answer.error
        return answer.ok

    def upload(self, path: str, data: bytes, **args: Any) -> Answer:
        stream = self.open("files.write", path=path, **args)
        self.data(stream, data)
        self.send(stream, wire.CLOSE)
        return self.finish(stream)

    def sh(self, script: str, **args: Any) -> Answer:
        return self.call("exec.start", argv=["sh", "-c", script], **args)

    def run(self, code: str, **args: Any) -> Answer:
        return self.call("context.run", code=code, **args)

    def close(self) -> None:
        self.channel.close()
        try:
            self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()


StartAgent = Callable[..., Client]


@pytest.fixture
def start_agent() -> Iterator[StartAgent]:
    """start_agent(*arguments of inside.py) -> Client, before HELLO."""
    clients: list[Client] = []
    homes: list[Path] = []

    def start(*arguments: str) -> Client:
        homes.append(home := Path(tempfile.mkdtemp(prefix="home-")).resolve())
        homes.append(temporary := Path(tempfile.mkdtemp(prefix="tmp-")).resolve())  # checkpoints end with their sandbox
        mine, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, str(Path(__file__).parent / "inside.py"), str(theirs.fileno()), str(home)]
            environ = {**os.environ, **({} if "--disk" in arguments else {"TMPDIR": str(temporary)})}
            process = subprocess.Popen([*command, *arguments], pass_fds=[theirs.fileno()], env=environ)
        clients.append(Client(home, process, mine))
        return clients[-1]

    yield start
    for client in clients:
        client.close()
    for home in homes:
        shutil.rmtree(home)


@pytest.fixture
def agent(start_agent: StartAgent) -> Client:
    client = start_agent()
    client.hello()
    return client
