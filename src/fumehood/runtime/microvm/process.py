"""One monitor as a process: in its control groups and in namespaces without a network before its first instruction, its
console kept short, its end seen.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from typing import IO

from fumehood.errors import SetupFailed
from fumehood.runtime.host.waiting import readable
from fumehood.runtime.microvm.machine import Place

CONSOLE_BYTES = 8 << 10  # of what a guest says on its serial port: enough for a panic
_LAST_WORDS_S = 1.0
_ENVIRON = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "HOME": "/nonexistent"}
# Arguments: the largest file in blocks of 512 bytes (sh(1)), doors, "--", the command.
# A process that moves itself waits for nobody; moved by us it would take 6 ms a hierarchy.
_LIMITS = 'ulimit -c 0 && ulimit -n 1024 && ulimit -l 0 && ulimit -f "$1" || exit 125; shift; '  # prlimit: one more execve
_ENTER = _LIMITS + 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 125; shift; done; shift; exec "$@"'
_NAMESPACES = ("unshare", "--net", "--ipc", "--uts", "--")
# --pdeathsig: of those that change no uid afterwards, which takes it off (commit_creds()); root's are found by their groups.
_PRIVILEGES = ("setpriv", "--no-new-privs", "--pdeathsig", "KILL", "--")


class Monitor:
    """Started by `start()`, ended by `aclose()`."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self.pid, self.name = process.pid, name
        self.pidfd = os.pidfd_open(process.pid)
        self._process, self._said = process, bytearray()
        assert process.stdout is not None
        self._listening = asyncio.create_task(self._listen(process.stdout))

    @classmethod
    def start(cls, command: Sequence[str], place: Place, *, file_bytes: int, pass_fds: Sequence[int] = ()) -> Monitor:
        """`command` in the place's directory. `file_bytes`: the largest file that it may make, for we read what it has made, to
        the end. Raises SetupFailed.
        """
        jail = (*(_NAMESPACES if place.uid is not None else ()), *_PRIVILEGES)
        argv = ["/bin/sh", "-c", _ENTER, "sh", str(file_bytes // 512), *place.doors, "--", *jail, *command]
        try:
            process = subprocess.Popen(
                argv,
                cwd=place.directory,
                env=_ENVIRON,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        except OSError as e:
            raise SetupFailed(f"{command[0]} was not started", cause=str(e), remediation="run `fumehood doctor`") from e
        return cls(process, command[0].rpartition("/")[2])

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def said(self) -> str:
        """The end of its output, the guest's console included: hostile text (H16)."""
        return self._said.decode("utf-8", "replace").strip()

    def failed(self, what: str) -> SetupFailed:
        return SetupFailed(f"{self.name}: {what}", cause=self.said()[-1000:], remediation="run `fumehood doctor`")

    async def ended(self) -> None:
        """Its last words are there then, unless somebody else holds its console open."""
        if self.pidfd >= 0:  # else aclose() saw it end
            await readable(self.pidfd)
        await asyncio.wait([self._listening], timeout=_LAST_WORDS_S)

    def kill(self) -> None:
        if self.alive:  # else its number may be another's
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def aclose(self) -> None:
        if self.pidfd >= 0:
            self.kill()
            await self.ended()
            self._process.wait()
            await asyncio.wait([self._listening])  # which may have been cancelled, with all tasks of a loop that ends
            os.close(self.pidfd)
            self.pidfd = -1

    async def _listen(self, console: IO[bytes]) -> None:
        """Until its last descriptor is closed, with its end."""
        os.set_blocking(console.fileno(), False)
        with console:
            while True:
                await readable(console.fileno())
                if not (data := console.read(1 << 16)):
                    return
                self._said += data
                del self._said[:-CONSOLE_BYTES]
