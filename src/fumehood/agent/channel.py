"""How a host reaches the agent of a guest: vsock under Firecracker, a virtio-serial port under QEMU.

The latest host is served: one that comes back after a restore may be here before the end of its old connection is seen.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path
from typing import Any, Protocol

from . import boot, wire
from .serve import Agent

VSOCK_PORT, HOST_CID = 1024, 2
PORT_NAME = "fumehood.agent"
LOOK_AGAIN_S = 0.01  # a port whose other end nobody holds is always "readable": it is looked at from time to time instead
_PORTS = Path("/sys/class/virtio-ports")


class Host(Protocol):
    def attach_to(self, agent: Agent) -> None:
        """Serve whoever comes, from now on."""
        ...

    def confess(self, failed: dict[str, Any]) -> None:
        """Wait for a host and say it in place of a proper HELLO."""
        ...


def find() -> Host:
    """Raises OSError when this machine has neither."""
    named = [p for p in sorted(_PORTS.glob("vport*")) if (p / "name").read_text().strip() == PORT_NAME]
    return SerialHost((named[0] / "dev").read_text()) if named else VsockHost()


class VsockHost:
    """Each connection is a host, which hears HELLO when it has said its own: what comes over one after a restore proves that
    the kernel has done with forgetting those from before."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._listener.bind((socket.VMADDR_CID_ANY, VSOCK_PORT))
        self._listener.listen(4)

    def attach_to(self, agent: Agent) -> None:
        self._listener.setblocking(False)
        agent.loop.on_gone = lambda: None  # the listener goes on
        agent.loop.reading(self._listener.fileno(), lambda: self._accept(agent), producer=False)

    def confess(self, failed: dict[str, Any]) -> None:
        with self._listener.accept()[0] as connection:
            connection.sendall(wire.encode_json(0, wire.HELLO, failed))
            connection.recv(1)  # until the host has gone: what it has not read would go with this machine

    def _accept(self, agent: Agent) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, (cid, _) = self._listener.accept()
            if cid != HOST_CID:
                connection.close()
                return
            agent.loop.attach(connection)


class Port:
    """A virtio-serial port in the shape of a socket: 0 bytes mean that the host has closed its end."""

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
    """A host is heard of when it asks for HELLO: a quick change of hosts can't be seen, and after a restore the port may still
    bring it what was meant for an earlier one."""

    def __init__(self, number: str) -> None:
        """`number` is the device's, as /sys shows it."""
        self._port = Port(boot.open_device(*map(int, number.split(":"))))

    def attach_to(self, agent: Agent) -> None:
        agent.loop.on_gone = lambda: agent.loop.later(LOOK_AGAIN_S, lambda: self._look(agent))
        self._look(agent)

    def confess(self, failed: dict[str, Any]) -> None:
        self._port.setblocking(True)
        greet = wire.Decoder().feed(self._port.recv(1 << 16))[0].json().get("greet")
        self._port.send(wire.encode_json(0, wire.HELLO, {"greet": greet, **failed}))
        self._port.recv(1)

    def _look(self, agent: Agent) -> None:
        poll = select.poll()
        poll.register(self._port.fileno(), select.POLLOUT)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            agent.loop.later(LOOK_AGAIN_S, lambda: self._look(agent))
        else:
            agent.loop.attach(self._port)
