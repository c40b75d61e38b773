"""One suite for every tier and both transports: fake and native in this process, native behind a real `fumehood serve`.

`make test` runs it as root and as a user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fumehood import Sandbox

START_S, STOP_S = 60.0, 30.0
Where = dict[str, Any]  # keyword arguments that say where a sandbox runs


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Where]:
    home = tmp_path_factory.mktemp("served")
    (home / "state").mkdir(mode=0o700)
    settings = {"FUMEHOOD_STATE_DIR": str(home / "state"), "FUMEHOOD_RUN_DIR": str(home / "run"), "FUMEHOOD_POOL_FLOOR": "1"}
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FUMEHOOD_")}
    command = [sys.executable, "-m", "fumehood.cli", "serve", "--listen", "127.0.0.1:0"]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, env={**clean, **settings}, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield {"url": (found := _announced(server, home))["url"], "api_key": found["api_key"]}
    finally:
        server.terminate()
        server.wait(STOP_S)


def _announced(server: subprocess.Popen[bytes], home: Path) -> dict[str, str]:
    deadline = time.monotonic() + START_S
    while not (file := home / "state" / "server.json").exists():
        assert server.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
        time.sleep(0.05)
    return json.loads(file.read_text())


@pytest.fixture(params=["native", "fake", "http"])
def where(request: pytest.FixtureRequest) -> Where:
    return request.getfixturevalue("served") if request.param == "http" else {"tier": request.param, "url": ""}


@pytest.fixture
def box(where: Where) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox
