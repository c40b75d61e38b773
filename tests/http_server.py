"""A real `fumehood serve` with directories of its own, for tests of what talks to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S, STOP_S = 60.0, 30.0
COMMAND = [sys.executable, "-m", "fumehood", "serve"]


@dataclass
class Serving:
    process: subprocess.Popen[bytes]
    url: str
    api_key: str

    @property
    def where(self) -> dict[str, Any]:
        """Keyword arguments of Sandbox."""
        return {"url": self.url, "api_key": self.api_key}

    @property
    def env(self) -> dict[str, str]:
        """Of a process whose sandboxes are to run here."""
        return {**clean_env(), "FUMEHOOD_URL": self.url, "FUMEHOOD_API_KEY": self.api_key}


def clean_env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("FUMEHOOD_")}


@contextmanager
def serving(home: Path, listen: str = "127.0.0.1:0", **settings: object) -> Iterator[Serving]:
    (home / "state").mkdir(mode=0o700)
    chosen = {"state_dir": home / "state", "run_dir": home / "run", "pool_floor": 1, "grace_s": 2, **settings}
    env = {**clean_env(), **{f"FUMEHOOD_{name.upper()}": str(value) for name, value in chosen.items()}}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen([*COMMAND, "--listen", listen], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Serving(process, **_announced(process, home))
    finally:
        process.terminate()
        process.wait(STOP_S)


def _announced(process: subprocess.Popen[bytes], home: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_S
    while not (file := home / "state" / "server.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
        time.sleep(0.05)
    found = json.loads(file.read_text())
    return {name: found[name] for name in ("url", "api_key")}
