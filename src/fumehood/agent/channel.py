"""How the host reaches a guest's agent: vsock under Firecracker, a virtio-serial port under QEMU.

One host at a time; the latest is served, since one that comes back after a restore is often here before the end of its old
connection is seen.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from pathlib import Path
from typing import Protocol

from . import boot
from .serve import Agent

VSOCK_PORT, HOST_CID = 1024, 2
PORT_NAME = "fumehood.agent"
LOOK_AGAIN_S = 0.01  # a port that nobody holds at the other end is always "readable": it is looked at from time to time
_PORTS = Path("/sys/class/virtio-ports")


class Host(Protocol):
    def attach_to(self, agent: Agent) -> None:
        """Serve whoever comes, from now on."""
        ...

    def accept_blocking(self) -> socket.socket | Port: ...


def find() -> Host:
    """Raises OSError when this machine has neither."""
    named = [p for p in sorted(_PORTS.glob("vport*")) if (p / "name").read_text().strip() == PORT_NAME]
    return SerialHost((named[0] / "dev").read_text()) if named else VsockHost()


class VsockHost:
    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
        self._listener.listen(4)

    def attach_to(self, agent: Agent) -> None:
        self._listener.setblocking(False)
        agent.loop.on_gone = lambda: None  # the listener goes on
        agent.loop.reading(self._listener.fileno(), lambda: self._accept(agent), producer=False)

    def accept_blocking(self) -> socket.socket:
        return self._listener.accept()[0]

    def _accept(self, agent: Agent) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, (cid, _) = self._listener.accept()
            if cid == HOST_CID:
                agent.greet(connection)
            else:
                connection.close()


class Port:
    """A virtio-serial port in the shape of a socket: 0 bytes mean that the host closed its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._fd, flag)

    def recv(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def send(self, data: bytes | bytearray) -> int:
        return os.write(self._fd, data)

    def close(self) -> None:
        """Stays open: the port is there as long as the machine."""


class SerialHost:
    def __init__(self, number: str) -> None:
        """`number` is the device's, as /sys shows it. User code gets no node of it."""
        path = f"{boot.RUN}/channel"
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(*map(int, number.split(":"))))
        self._port = Port(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        os.unlink(path)

    def attach_to(self, agent: Agent) -> None:
        agent.loop.on_gone = lambda: agent.loop.later(LOOK_AGAIN_S, lambda: self._look(agent))
        self._look(agent)

    def accept_blocking(self) -> Port:
        self._wait(None)
        return self._port

    def _look(self, agent: Agent) -> None:
        if self._wait(0):
            agent.greet(self._port)
        else:
            agent.loop.later(LOOK_AGAIN_S, lambda: self._look(agent))

    def _wait(self, timeout_ms: int | None) -> bool:
        """Until somebody holds the other end."""
        poll = select.poll()
        poll.register(self._port.fileno(), select.POLLOUT)
        return any(events & select.POLLOUT for _, events in poll.poll(timeout_ms))
