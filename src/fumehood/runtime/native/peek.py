"""Where a notified call wants to send: reads the sockaddr of a stopped, hostile process, within bounds (M16, H9).

What is read here is counted and shown, never relied upon: another thread may change it at any time, and the sandbox's
network namespace has no route whatever the address says.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from fumehood.runtime.native import syscalls

PIDFD_GETFD = 438
MAX_SOCKADDR_BYTES = 128  # sizeof(struct sockaddr_storage)
_MAX_MESSAGES = 16  # looked at in one sendmmsg()
_MSGHDR_BYTES, _MMSGHDR_BYTES = 16, 64  # of the former only name and namelen


class Destination(NamedTuple):
    """`port` 0 and an empty `address` if it could not be read."""

    family: int
    address: str
    port: int

    @property
    def stays_inside(self) -> bool:
        """AF_UNIX, AF_UNSPEC (dissolves a connection) and the loopback: nothing that a route could carry away."""
        if self.family in (socket.AF_UNIX, socket.AF_UNSPEC):
            return True
        if not self.address:
            return False
        ip = ipaddress.ip_address(self.address)
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return ip.is_loopback or ip.is_unspecified


UNREADABLE = Destination(-1, "", 0)


def _read(pid: int, address: int, size: int) -> bytes:
    """Raises OSError when the process is gone, not readable by us, or the pointer is bad."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # pread() takes a signed offset; a pointer above that is the kernel's half and no user's.
        return os.pread(memory, size, address) if address < 1 << 63 else b""
    finally:
        os.close(memory)


def _parse(raw: bytes) -> Destination:
    if len(raw) < 2:
        return UNREADABLE
    family = struct.unpack_from("=H", raw)[0]
    if family == socket.AF_INET and len(raw) >= 8:
        return Destination(family, socket.inet_ntop(socket.AF_INET, raw[4:8]), int.from_bytes(raw[2:4], "big"))
    if family == socket.AF_INET6 and len(raw) >= 24:
        return Destination(family, socket.inet_ntop(socket.AF_INET6, raw[8:24]), int.from_bytes(raw[2:4], "big"))
    return Destination(family, "", 0)


def _sockaddr(pid: int, pointer: int, length: int) -> Destination:
    return _parse(_read(pid, pointer, min(length & 0xFFFFFFFF, MAX_SOCKADDR_BYTES)))


def _messages(name: str, args: tuple[int, ...]) -> Iterator[int]:
    """Addresses of the struct msghdr of the call."""
    count = min(args[2] & 0xFFFFFFFF, _MAX_MESSAGES) if name == "sendmmsg" else 1
    yield from (args[1] + i * _MMSGHDR_BYTES for i in range(count))


def destinations(name: str, pid: int, args: tuple[int, ...]) -> Iterator[Destination]:
    """Of connect, sendto, sendmsg or sendmmsg; none where the call names none. UNREADABLE if memory can't be read."""
    try:
        if name == "connect":
            yield _sockaddr(pid, args[1], args[2])
        elif name == "sendto":
            yield _sockaddr(pid, args[4], args[5])
        else:
            for message in _messages(name, args):
                pointer, length = struct.unpack_from("=QI", _read(pid, message, _MSGHDR_BYTES))
                if pointer and length:
                    yield _sockaddr(pid, pointer, length)
    except (OSError, struct.error):
        yield UNREADABLE


def copy_descriptor(pid: int, number: int) -> int:
    """The process's descriptor, as one of ours (close-on-exec). Raises OSError."""
    pidfd = syscalls.call(syscalls.PIDFD_OPEN, pid, 0)
    try:
        return syscalls.call(PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)


def _leader(tid: int) -> int:
    with open(f"/proc/{tid}/status", "rb") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(b"Tgid:"))


def protocol(tid: int, number: int) -> str:
    """tcp, udp or ip (unknown) for a socket of the process."""
    with suppress(OSError, StopIteration), socket.socket(fileno=copy_descriptor(_leader(tid), _signed(number))) as s:
        kinds = {int(socket.SOCK_STREAM): "tcp", int(socket.SOCK_DGRAM): "udp"}
        return kinds.get(s.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE), "ip")
    return "ip"


def _signed(number: int) -> int:
    return ctypes.c_int(number & 0xFFFFFFFF).value
