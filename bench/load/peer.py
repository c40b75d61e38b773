"""A peer in the same run: jupyter-kernel-gateway, whose kernels are processes of the server's own user, not isolated.

It is installed into a venv of its own, never into the project's. Its API: REST starts and ends kernels, a websocket for
each kernel carries the messages of Jupyter's protocol.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import uvloop
from websockets.asyncio.client import ClientConnection, connect

from bench.figures import summary
from bench.load.http import Client, Gone
from bench.load.latency import CALLERS

NAME = "jupyter-kernel-gateway"
VERSION = "3.0.1"
INSTALL_S, START_S, ANSWER_S = 300.0, 60.0, 120.0


class NoPeer(Exception):
    """It can't be installed or started here; the message says why."""


def _command(*argv: str, timeout_s: float) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NoPeer(f"{argv[0]}: {e}") from e
    if done.returncode:
        raise NoPeer(f"{' '.join(argv[-3:])} ended with {done.returncode}: {done.stderr[-300:]}")


def install(work: Path) -> Path:
    """Its Python. Raises NoPeer."""
    python = work / "venv/bin/python"
    _command(sys.executable, "-m", "venv", str(work / "venv"), timeout_s=INSTALL_S)
    packages = (f"jupyter_kernel_gateway=={VERSION}", "ipykernel")
    _command(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages, timeout_s=INSTALL_S)
    return python


class Gateway:
    """A running one; `port` is its own. Use as a context manager."""

    def __init__(self, python: Path, work: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = [str(python), "-m", "kernel_gateway", "--KernelGatewayApp.ip=127.0.0.1"]
        self._command += [f"--KernelGatewayApp.port={self.port}", "--KernelGatewayApp.port_retries=0"]
        self._log = work / "peer.log"

    def __enter__(self) -> Gateway:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._log.parent)
        until = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise NoPeer(f"it did not start: {self._log.read_text()[-400:]}")
            time.sleep(0.1)
        return self

    def _answers(self) -> bool:
        try:
            return asyncio.run(Client("127.0.0.1", self.port).ask("GET", "/api")).status == 200
        except (OSError, Gone):
            return False

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Kernel:
    """One kernel and its websocket."""

    def __init__(self, client: Client, port: int) -> None:
        self._client, self._port = client, port

    async def open(self) -> Kernel:
        reply = await self._client.ask("POST", "/api/kernels", {"name": "python3"})
        if reply.status != 201:
            raise ValueError(f"POST /api/kernels answered {reply.status}: {bytes(reply.body[:200])!r}")
        self._id = reply.json()["id"]
        url = f"ws://127.0.0.1:{self._port}/api/kernels/{self._id}/channels"
        self._socket: ClientConnection = await connect(url, max_size=None, compression=None)
        return self

    async def run(self, code: str) -> str:
        """What it printed, once reply and idle have both come. Raises TimeoutError."""
        id, session = uuid.uuid4().hex, uuid.uuid4().hex
        header = {"msg_id": id, "session": session, "username": "", "msg_type": "execute_request", "version": "5.3"}
        content: dict[str, Any] = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
        content["user_expressions"] = {}
        message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
        await self._socket.send(json.dumps(message))
        printed, waiting = "", {"execute_reply", "idle"}
        async with asyncio.timeout(ANSWER_S):
            while waiting:
                self._acknowledge_at_once()
                answer = json.loads(await self._socket.recv())
                if answer["parent_header"].get("msg_id") != id:
                    continue
                kind, content = answer["header"]["msg_type"], answer["content"]
                printed += content["text"] if kind == "stream" else ""
                waiting.discard(kind)
                if kind == "status":
                    waiting.discard(content["execution_state"])
        return printed

    def _acknowledge_at_once(self) -> None:
        """It sends several small messages and leaves Nagle on, so a client's delayed ACK adds 40 ms to each run. A browser
        on another machine sees that or not; here the peer is measured at its best. The option holds for one ACK only."""
        own: socket.socket = self._socket.transport.get_extra_info("socket")
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def close(self) -> None:
        await self._socket.close()
        await self._client.ask("DELETE", f"/api/kernels/{self._id}")


def measure(work: Path, starts: int, runs: int) -> dict[str, Any]:
    """Kernel start to first result and end, and runs in live kernels, with CALLERS callers. Raises NoPeer."""
    with Gateway(install(work), work) as gateway:
        return {"name": NAME, "version": VERSION, **uvloop.run(_measure(gateway.port, starts, runs))}


async def _measure(port: int, starts: int, runs: int) -> dict[str, Any]:
    client = Client("127.0.0.1", port)

    async def start() -> tuple[Kernel, float]:
        nonce, started = secrets.token_hex(8), time.perf_counter()
        kernel = await Kernel(client, port).open()
        await _checked(kernel, nonce)
        return kernel, (time.perf_counter() - started) * 1e3

    async def starter(count: int) -> list[float]:
        times = list[float]()
        for _ in range(count):
            kernel, ms = await start()
            await kernel.close()
            times.append(ms)
        return times

    async def runner(kernel: Kernel, count: int) -> list[float]:
        times = list[float]()
        for _ in range(count):
            nonce, started = secrets.token_hex(8), time.perf_counter()
            await _checked(kernel, nonce)
            times.append((time.perf_counter() - started) * 1e3)
        return times

    await starter(1)
    alone = await starter(max(3, starts // CALLERS))
    eight = await asyncio.gather(*(starter(max(1, starts // CALLERS)) for _ in range(CALLERS)))
    kernels = [(await start())[0] for _ in range(CALLERS)]
    one = await runner(kernels[0], runs)
    together = await asyncio.gather(*(runner(k, runs // CALLERS) for k in kernels))
    await asyncio.gather(*(k.close() for k in kernels))
    client.close()
    return {
        "start_alone": summary(alone, ()),
        "start_eight": summary([ms for each in eight for ms in each], ()),
        "run_alone": summary(one, ()),
        "run_eight": summary([ms for each in together for ms in each], ()),
    }


async def _checked(kernel: Kernel, nonce: str) -> None:
    if (printed := await kernel.run(f"print({nonce!r})")) != nonce + "\n":
        raise ValueError(f"the kernel answered {printed!r} to {nonce!r}")
