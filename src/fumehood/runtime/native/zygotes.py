"""The supervisor's view of its zygotes: start one, ask it for a sandbox, notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fumehood
from fumehood.errors import FumehoodError, SandboxGone, SetupFailed
from fumehood.model import Template
from fumehood.runtime.host.waiting import readable
from fumehood.runtime.native import builder, seccomp_install

_PACKAGE = str(Path(fumehood.__file__).parent)
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7))


@dataclass(frozen=True, slots=True)
class Clone:
    """A fork in its namespaces, of nobody yet: `channel` to it, where it announces seccomp listeners, its host pid."""

    channel: socket.socket
    announcements: socket.socket
    pid: int

    def waits(self) -> bool:
        try:
            return self.channel.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True

    def close(self) -> None:
        """It ends by itself when its channel does."""
        self.channel.close()
        self.announcements.close()


class Zygote:
    """Owns one zygote process. `lost` says why it is gone, empty while it lives."""

    def __init__(self, template: Template, process: subprocess.Popen[bytes], control: socket.socket, log: Path) -> None:
        self.template, self.log, self.lost = template, log, ""
        self._process, self._control = process, control
        self._failure = ""
        self._watch: asyncio.Task[None] | None = None
        self._refill: asyncio.Task[None] | None = None
        self._spare: Clone | None = None

    @classmethod
    async def start(cls, template: Template, uid: int | None, scratch: Path, timeout_s: float, keep: int = 0) -> Zygote:
        """Build the root and preload. `uid` None = rootless; `keep`: see NativeRuntime.switches.

        Raises SetupFailed with the zygote's own words.
        """
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.setblocking(False)
        log = scratch.parent / f"{template.name}.log"
        with theirs, log.open("ab") as sink:
            # In the loop's own thread: the zygote dies with the thread that started it (PR_SET_PDEATHSIG, prctl(2)).
            process = subprocess.Popen(  # noqa: ASYNC220
                builder.command(sys.executable, str(Path(_PACKAGE).parent), "builder", theirs.fileno()),
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in the caller's terminal must not reach it
            )
        self = cls(template, process, control, log)
        try:
            order = json.dumps(_order(template, uid, scratch) | {"keep": keep}).encode()
            async with asyncio.timeout(timeout_s):
                await self._ask(order, "built")  # builder.py
                await self._ask(order, "ready")  # zygote.py
        except TimeoutError:
            await self.aclose()
            raise SetupFailed(f"the zygote of template {template.name} was not ready within {timeout_s} s") from None
        except BaseException:
            await self.aclose()
            raise
        self._watch = asyncio.create_task(self._notice_end())
        return self

    async def _ask(self, order: bytes, wanted: str) -> None:
        """Each program reads the order once. A socket that closes with an unread message would lose its last words."""
        self._control.send(order)
        try:
            answer = await asyncio.get_running_loop().sock_recv(self._control, 4096)
        except ConnectionResetError:
            answer = b""
        told: dict[str, Any] = json.loads(answer) if answer else {}
        if wanted not in told:
            last = self.log.read_text(errors="replace")[-2000:]
            raise SetupFailed(
                f"the zygote of template {self.template.name} could not start",
                cause=told.get("failed") or last or "it ended without a word",
                remediation="run `fumehood doctor`",
            )

    async def _notice_end(self) -> None:
        loop = asyncio.get_running_loop()
        while answer := await loop.sock_recv(self._control, 4096):
            self._failure = json.loads(answer).get("failed", "")
        self.lost = "the zygote ended"

    def ended(self) -> bool:
        """Asks the kernel, so that a death is known before the loop came to hear of it (H18)."""
        if self._process.poll() is not None:
            self.lost = self.lost or "the zygote ended"
        return bool(self.lost)

    async def take(self) -> Clone:
        """A clone that waits for its plan: the spare one, while the next is made in the background."""
        spare, self._spare = self._spare, None
        if self._refill is not None and spare is None:
            await asyncio.shield(self._refill)  # it is being made
            spare, self._spare = self._spare, None
        clone = spare if spare is not None and spare.waits() else await self._clone()
        if self._spare is None and (self._refill is None or self._refill.done()):  # one at a time: a second would be lost
            self._refill = asyncio.create_task(self._make_spare())
        return clone

    async def _make_spare(self) -> None:
        """Best effort: whoever needs a clone and finds none makes one and hears the error itself."""
        with contextlib.suppress(FumehoodError, OSError):
            self._spare = await self._clone()

    async def _clone(self) -> Clone:
        """Raises SandboxGone when the zygote has ended, SetupFailed when it could not fork."""
        channel, theirs = socket.socketpair()
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        channel.setblocking(False)
        announcements, announce = seccomp_install.channel()
        try:
            with theirs, announce:
                socket.send_fds(self._control, [b"spawn"], [theirs.fileno(), announce.fileno()])
            await readable(channel.fileno())
            data, ancillary, _flags, _address = channel.recvmsg(1, socket.CMSG_SPACE(_CREDENTIALS.size))
            if not data and self.ended():
                raise ConnectionResetError
            if not data:
                raise SetupFailed("the zygote could not fork a sandbox", cause=self.lost or self._failure)
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
            return Clone(channel, announcements, _CREDENTIALS.unpack(ancillary[0][2])[0])
        except (BrokenPipeError, ConnectionResetError):
            self.lost = self.lost or "the zygote ended"
            channel.close()
            announcements.close()
            raise SandboxGone("the zygote ended", remediation="try again: a new one is built") from None
        except BaseException:
            channel.close()
            announcements.close()
            raise

    async def aclose(self) -> None:
        """End it and, with it, every sandbox forked from it."""
        self.lost = self.lost or "closed"
        for task in (self._watch, self._refill):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._spare is not None:
            self._spare.close()
        self._control.close()
        if self._process.poll() is not None:
            return
        pidfd = os.pidfd_open(self._process.pid)  # not a thread: at exit no new one can be had
        self._process.send_signal(signal.SIGKILL)
        await readable(pidfd)
        os.close(pidfd)
        self._process.wait()


def _order(template: Template, uid: int | None, scratch: Path) -> dict[str, Any]:
    image = template.root
    return {
        "uid": uid,
        "scratch": str(scratch),
        "package": _PACKAGE,
        "template": asdict(template),
        "prefixes": _prefixes() if image is None else [],
        "python": sys.executable if image is None else None,
        "environ": _library_environ(),
    }


def shown_in(template: Template, own: Sequence[str]) -> list[str]:
    """The paths that the template shows below a directory that each sandbox covers with one of its own."""
    paths = [*([] if template.root else _prefixes()), *(m.target for m in template.mounts)]
    return [p for p in paths if any(p.startswith(f"{directory}/") for directory in own)]


@cache
def _prefixes() -> list[str]:
    """Where this interpreter and its packages lie: the installation, then the virtual environment on top of it."""
    return sorted({sys.base_prefix, sys.base_exec_prefix, sys.prefix, str(Path(sys.executable).resolve().parents[1])})


def _library_environ() -> dict[str, str]:
    # One thread per numeric library: the zygote must stay single-threaded to be forked, and a sandbox has one CPU.
    return {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")} | {"MPLCONFIGDIR": "/tmp/.mpl"}
