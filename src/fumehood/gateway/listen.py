"""Where the server listens: the one place that makes its socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from fumehood.errors import InvalidInput

BACKLOG = 2048
_FORMS = "HOST:PORT, [IPV6]:PORT or unix:/path"


def bind(listen: str) -> socket.socket:
    """A listening socket at `HOST:PORT` or `unix:/path`. Raises InvalidInput."""
    try:
        return _bind_unix(Path(listen.removeprefix("unix:"))) if listen.startswith("unix:/") else _bind_tcp(*_host_port(listen))
    except (OSError, ValueError) as e:  # ValueError: a name that can be no host's
        raise _cannot(listen, e) from None


def address_of(sock: socket.socket, listen: str) -> str:
    """How a client on this machine reaches it: `http://127.0.0.1:41234` or `unix:/path`."""
    if sock.family == socket.AF_UNIX:
        return listen
    bound: tuple[str, int] = sock.getsockname()[:2]
    host, port = bound
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _host_port(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if is_bracketed else host
    if bare and is_bracketed == (":" in bare) and port.isascii() and port.isdigit() and int(port) < 1 << 16:
        return bare, int(port)
    raise InvalidInput(f"bad address {listen[:80]!r}", cause=f"it is not {_FORMS}", remediation="such as 127.0.0.1:8470")


def _bind_tcp(host: str, port: int) -> socket.socket:
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these: without, a peer that lost its network holds its place until the answer is ready.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_unix(path: Path) -> socket.socket:
    if "\0" in str(path):
        raise ValueError("a path ends at a NUL")  # the kernel would take what stands before it
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: Path) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        cause = "another kind of file is there"
        raise InvalidInput(f"can't listen at unix:{path}", cause=cause, remediation="remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # its backlog is full: somebody has it
    raise OSError(errno.EADDRINUSE, "somebody listens there")


def _cannot(listen: str, e: OSError | ValueError) -> InvalidInput:
    number = e.errno if isinstance(e, OSError) and not isinstance(e, socket.gaierror) else None
    remediation = {
        errno.EADDRINUSE: "stop what listens there (fumehood serve already?), or choose another address",
        errno.EACCES: "choose a port above 1023 or a directory of your own, or grant CAP_NET_BIND_SERVICE",
        errno.EADDRNOTAVAIL: "choose an address of this machine; 127.0.0.1 is always one",
        errno.ENOENT: "make the directory first",
    }.get(number or 0, f"choose another address: {_FORMS}")
    return InvalidInput(f"can't listen at {listen[:200]}", cause=str(e), remediation=remediation)
