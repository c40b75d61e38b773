"""One real server for each file, its log read at the end; two tenants who know nothing of each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import client, new_key

from http_server import Serving, serving


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's directories."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, home: Path) -> Iterator[Serving]:
    """Of the settings that the file names in SETTINGS. Nothing in it may have failed inside."""
    with serving(home, **getattr(request.module, "SETTINGS", {})) as serving_:
        yield serving_
    log = (home / "log").read_text()
    assert "failed inside" not in log and "Traceback" not in log and "never retrieved" not in log, log[-20_000:]


@pytest.fixture(scope="module")
def admin(server: Serving) -> Iterator[httpx.Client]:
    """Of the tenant `local`, and in less of a hurry to be told to slow down than the operator's own key."""
    with client(server) as operator:
        key = new_key(operator, "local", scopes=["sandboxes", "admin"])["api_key"]
    with client(server, key) as http:
        yield http


@pytest.fixture(scope="module")
def alice(server: Serving, admin: httpx.Client) -> Iterator[httpx.Client]:
    """Of the tenant `alice`; no admin."""
    with client(server, new_key(admin, "alice")["api_key"]) as http:
        yield http


@pytest.fixture(scope="module")
def robert(server: Serving, admin: httpx.Client) -> Iterator[httpx.Client]:
    with client(server, new_key(admin, "robert")["api_key"]) as http:
        yield http


@pytest.fixture
def box(alice: httpx.Client) -> Iterator[str]:
    """The path of a sandbox of Alice's."""
    made: dict[str, Any] = alice.post("/v1/sandboxes", json={}).raise_for_status().json()
    path = f"/v1/sandboxes/{made['id']}"
    yield path
    alice.delete(path)
