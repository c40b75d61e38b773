"""The host's side of the escape demo: secrets that nobody inside may see, doors that nobody inside may reach."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import socket
import struct
import sys
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fumehood.demo.probe import CANARY

_CANARY = re.compile(CANARY.decode())


@dataclass(frozen=True, slots=True)
class Host:
    """`public` is told to the attempts; the secret is in a file and behind every listener."""

    mark: str
    folder: Path
    public: dict[str, Any]
    before: tuple[Any, ...]

    def breaches(self, *outputs: str) -> list[str]:
        """What the host itself can see of a break-out, whatever the guest says."""
        # By pattern, not by value: whoever starts us may plant more of them, say in our environment.
        found = [f"a secret of the host was read: {text}" for output in outputs for text in _CANARY.findall(output)]
        if (now := _fingerprint()) != self.before:
            changed = [a for a, b in zip(now, self.before, strict=True) if a != b]
            found.append(f"the host changed: {changed}")
        return found

    def survivors(self) -> list[str]:
        """Processes of a sandbox that is closed."""
        return [f"pid {pid} outlived its sandbox" for pid, line in _command_lines() if self.mark in line]


@asynccontextmanager
async def watched() -> AsyncGenerator[Host]:
    secret, mark, decoy = f"fumehood-canary-{secrets.token_hex(16)}", secrets.token_hex(12), secrets.token_hex(12)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fumehood-host-")))
        (folder / "secret").write_text(secret)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            "import time; time.sleep(3600)",
            decoy,
            start_new_session=True,  # Ctrl-C is not for it
        )
        stack.push_async_callback(_end, process)
        doors = await _doors(stack, folder, secret)
        facts = {"hostname": socket.gethostname(), "pid": process.pid, "decoy": decoy, "mark": mark,
                 "canary_file": str(folder / "secret")}  # fmt: skip
        yield Host(mark, folder, facts | doors, _fingerprint())


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):  # somebody else ended it, and it is reaped: nothing is left to do
        process.kill()
    await process.wait()


async def _doors(stack: AsyncExitStack, folder: Path, secret: str) -> dict[str, Any]:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(secret.encode())
        with suppress(OSError):
            await writer.drain()
        writer.close()

    abstract = f"fumehood-{secrets.token_hex(8)}"
    tcp = await asyncio.start_server(answer, "0.0.0.0", 0)
    for server in (
        tcp,
        await asyncio.start_unix_server(answer, f"\0{abstract}"),
        await asyncio.start_unix_server(answer, folder / "door"),
    ):
        stack.callback(server.close)
    port = tcp.sockets[0].getsockname()[1]
    return {"port": port, "abstract": abstract, "unix": str(folder / "door"), "addresses": sorted(_addresses()),
            "gateways": _gateways(), "resolvers": _resolvers()}  # fmt: skip


def _addresses() -> set[str]:
    """Our own IPv4 addresses, from the kernel's table of local routes."""
    lines = Path("/proc/net/fib_trie").read_text().split("\n")
    local = {a.split()[-1] for a, b in pairwise(lines) if "/32 host LOCAL" in b and "|--" in a}
    return {a for a in local if not a.startswith("127.")}


def _gateways() -> list[str]:
    rows = [line.split() for line in Path("/proc/net/route").read_text().split("\n")[1:] if line]
    return sorted({socket.inet_ntoa(struct.pack("<I", int(r[2], 16))) for r in rows if int(r[2], 16)})


def _resolvers() -> list[str]:
    try:
        lines = Path("/etc/resolv.conf").read_text().split("\n")
    except FileNotFoundError:
        return []
    words = [line.split() for line in lines if line.startswith("nameserver ")]
    return [w[1] for w in words if len(w) > 1 and ":" not in w[1]]


def _fingerprint() -> tuple[Any, ...]:
    """What a break-out would change: our name, our interpreter and its library, files that an attempt would leave."""
    digests = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in (os.path.realpath(sys.executable), os.__file__)]
    modes = [Path(p).stat().st_mode for p in ("/etc/passwd", "/etc/hosts", os.__file__) if Path(p).exists()]
    left = [p for p in ("/fumehood-breach", "/tmp/fumehood-breach", "/etc/ld.so.preload") if Path(p).exists()]
    return (socket.gethostname(), *digests, *modes, *left)


def _command_lines() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            yield int(path.parent.name), path.read_bytes().decode(errors="replace")
