"""A real `fumehood serve` with directories of its own, and the command line against it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

START_S, STOP_S = 60.0, 60.0


class Served:
    def __init__(self, command: list[str], home: Path, *options: str, **settings: object) -> None:
        self.command, self.home, self.options, self.said = command, home, options, b""
        self.state = home / "state"
        self.state.mkdir(mode=0o700, exist_ok=True)
        chosen = {"state_dir": self.state, "run_dir": home / "run", "pool_floor": 1, "grace_s": 5, **settings}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FUMEHOOD_")}
        self.env = clean | {f"FUMEHOOD_{k.upper()}": str(v) for k, v in chosen.items()}

    @property
    def file(self) -> Path:
        return self.state / "server.json"

    def begin(self, *options: str) -> subprocess.Popen[bytes]:
        program = [*self.command, "serve", *(options or ("--listen", "127.0.0.1:0", *self.options))]
        return subprocess.Popen(
            program, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.home
        )

    def start(self, *options: str) -> Served:
        self.process, self.said = self.begin(*options), b""
        self.hear("Ctrl-C stops it")
        return self

    def hear(self, words: str) -> None:
        deadline = time.monotonic() + START_S
        while words.encode() not in self.said:
            assert self.process.poll() is None and time.monotonic() < deadline, self.said.decode()
            self.said += self._more(0.2)

    def _more(self, wait_s: float) -> bytes:
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], wait_s)[0]
        return os.read(self.process.stdout.fileno(), 65_536) if ready else b""

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=STOP_S)

    def stop(self) -> int:
        """Its exit code; `said` is all that it said."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=STOP_S)
        self.said += said
        return self.process.returncode

    def announced(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def run(self, *args: str, stdin: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *args],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.home,
            env={**self.env, **(env or {})},
            check=False,
        )

    def do(self, *args: str, stdin: str = "") -> str:
        """What a command printed that must succeed."""
        done = self.run(*args, stdin=stdin)
        assert done.returncode == 0, (args, done.stdout, done.stderr)
        return done.stdout

    def json(self, *args: str) -> Any:
        return json.loads(self.do(*args, "--json"))
