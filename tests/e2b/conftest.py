"""One real `fumehood serve` for all of these tests, with the native tier behind it: what an SDK's user has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from e2b_code_interpreter import Sandbox
from e2b_server import HEADER_TIMEOUT_S, UPLOAD_BYTES, Server

from http_server import serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("e2b")
    with serving(home, max_upload_bytes=UPLOAD_BYTES, header_timeout_s=HEADER_TIMEOUT_S) as started:
        yield Server(started.url, started.api_key, started.process.pid, home)


@pytest.fixture
def make(server: Server) -> Iterator[Callable[..., Sandbox]]:
    made: list[Sandbox] = []

    def create(**options: Any) -> Sandbox:
        made.append(Sandbox.create(**{"template": "python", **server.options(), **options}))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill()


@pytest.fixture(scope="module")
def box(server: Server) -> Iterator[Sandbox]:
    """One for the tests of a file that leave it as it was."""
    sandbox = Sandbox.create(template="python", **server.options())
    yield sandbox
    sandbox.kill()
