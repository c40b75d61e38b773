"""The host's end of a virtio-serial port, which QEMU offers as a Unix socket to one client at a time."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from pathlib import Path

from fumehood.agent import wire
from fumehood.errors import WireError

_RECV_BYTES = 1 << 16
_CREDENTIALS = struct.Struct("3i")  # struct ucred


async def ask(path: Path, pid: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Asks the agent for HELLO, which is the next thing to be read. Waits as long as it takes: QEMU takes nothing from a port
    that the guest has not opened yet, so what was asked early stays in the socket.

    Raises OSError when nobody listens or the connection ends, WireError when it is not the process `pid` that listens.
    """
    loop, token = asyncio.get_running_loop(), secrets.token_hex(8)
    with contextlib.ExitStack() as undo:
        channel = undo.enter_context(socket.socket(socket.AF_UNIX))
        channel.setblocking(False)
        channel.connect(str(path))
        _check_peer(channel, pid)
        greeting = {"generation": wire.GENERATION, "greet": token}
        await loop.sock_sendall(channel, wire.encode_json(0, wire.HELLO, greeting))
        reader = asyncio.StreamReader()
        reader.feed_data(await _from_hello(channel, token))
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.create_unix_connection(lambda: protocol, sock=channel)
        undo.pop_all()
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _check_peer(channel: socket.socket, pid: int) -> None:
    """The directory is QEMU's to write: a QEMU that was taken over could put another daemon's socket there, by a link."""
    found = _CREDENTIALS.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    if found != pid:
        raise WireError("the machine's channel leads to another process", cause=f"process {found}, not {pid}")


async def _from_hello(channel: socket.socket, token: str) -> bytes:
    """What has arrived, from the answer's header on. Before it may be anything, as the rest of a frame for an earlier host."""
    mark, data = b'{"greet":"' + token.encode() + b'",', b""
    while (start := data.find(mark, wire.HEADER_BYTES)) < 0:
        data = data[1 - len(mark) - wire.HEADER_BYTES :]
        if not (more := await asyncio.get_running_loop().sock_recv(channel, _RECV_BYTES)):
            raise ConnectionResetError("the channel was closed")
        data += more
    return data[start - wire.HEADER_BYTES :]
