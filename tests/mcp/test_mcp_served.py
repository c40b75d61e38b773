"""/mcp of a real `fumehood serve`: behind the same keys as everything else, its sandboxes the caller's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from mcp.client.streamable_http import streamable_http_client
from mcp_seen import text
from test_mcp_http import HEADERS, HELLO

from http_server import Serving, serving
from mcp import Client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path, grace_s=30) as started:
        yield started


def _bearer(key: str) -> dict[str, str]:
    return {**HEADERS, "authorization": f"Bearer {key}"}


async def test_a_session_works_with_its_key_alone_and_leaves_no_sandbox(server: Serving) -> None:
    async with httpx2.AsyncClient(base_url=server.url, headers=_bearer(server.api_key)) as http:
        other = _bearer((await http.post("/v1/keys", json={"tenant": "other"})).json()["api_key"])

        async def live(headers: dict[str, str]) -> list[str]:
            return [s["id"] for s in (await http.get("/v1/sandboxes", headers=headers)).json()["sandboxes"]]

        async with Client(streamable_http_client(f"{server.url}/mcp", http_client=http)) as client:
            await client.call_tool("run_code", {"code": "x = 41"})
            assert text(await client.call_tool("run_code", {"code": "x + 1"})) == "42"
            (mine,) = (await client.call_tool("list_sandboxes", {})).structured_content["sandboxes"]
            assert mine["policy"] == "default" and mine["memory_bytes"] > 0
            assert await live({}) == [mine["sandbox_id"]] and await live(other) == []
        async with asyncio.timeout(10):
            while await live({}):  # noqa: ASYNC110 # a session that ends tells nobody when its sandboxes have
                await asyncio.sleep(0.05)

        session = {"mcp-session-id": (await http.post("/mcp", json=HELLO)).headers["mcp-session-id"]}
        asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        answers = [await http.post("/mcp", json=asked, headers={**session, **headers}) for headers in ({}, other)]
        assert [a.status_code for a in answers] == [200, 404]
    async with httpx2.AsyncClient(base_url=server.url, headers=HEADERS) as nobody:
        refused = await nobody.post("/mcp", json=asked, headers=session)
    assert refused.status_code == 401 and refused.json()["code"] == "unauthenticated"


async def test_a_call_that_runs_when_the_server_is_stopped_gets_its_answer_and_its_session_an_end(
    server: Serving, tmp_path: Path
) -> None:
    async with (
        httpx2.AsyncClient(base_url=server.url, headers=_bearer(server.api_key)) as http,
        Client(streamable_http_client(f"{server.url}/mcp", http_client=http)) as client,
    ):
        await client.list_tools()  # or the client would ask for their schemas once it has its answer
        calling = asyncio.ensure_future(client.call_tool("run_code", {"code": "import time; time.sleep(1); print('ended')"}))
        async with asyncio.timeout(20):
            while not (await http.get("/v1/status")).json()["executions"]:  # noqa: ASYNC110 # a run tells others nothing
                await asyncio.sleep(0.02)
        server.process.terminate()
        assert text(await calling) == "ended"
        assert await asyncio.to_thread(server.process.wait, 30) == 0
    assert "ERROR" not in (tmp_path / "log").read_text()
