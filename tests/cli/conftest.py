"""The real command in a real process: what a person or a script sees of it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from served import Served


@pytest.fixture(scope="session")
def command() -> list[str]:
    return [sys.executable, "-c", "from fumehood.cli import main; main()"]


@pytest.fixture
def fumehood(command: list[str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*args: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *args], input=stdin, capture_output=True, text=True, timeout=timeout, cwd=tmp_path, check=False
        )

    return run


@pytest.fixture(scope="module")
def server(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    started = Served(command, tmp_path_factory.mktemp("served")).start()
    yield started
    assert started.stop() == 0, started.said.decode()


@pytest.fixture
def box(server: Served) -> Iterator[str]:
    made = server.do("create", "--label", "of=test").strip()
    yield made
    server.run("kill", made)
