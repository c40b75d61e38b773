"""One suite for every tier and both transports: fake and native in this process, native behind a real `fumehood serve`.

`make test` runs it as root, and native as a user once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fumehood import Sandbox
from http_server import serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with serving(tmp_path_factory.mktemp("served")) as server:
        yield server.where


@pytest.fixture(params=[pytest.param("native", marks=pytest.mark.rootless), "fake", "http"])
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue("served") if request.param == "http" else {"tier": request.param, "url": ""}


@pytest.fixture
def box(where: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox
