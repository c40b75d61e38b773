"""The same tools over streamable HTTP: many sessions in one server, each with its own sandboxes and its own key."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager

import httpx2
import pytest
from mcp.client.streamable_http import streamable_http_client
from mcp_seen import marked, text, until

from fumehood.errors import Unauthenticated
from mcp import Client

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}},
}
HEADERS = {"accept": "application/json, text/event-stream"}


def by_key(headers):
    """As a gateway does it, but for where the sandboxes run: here in this process."""
    if headers.get("authorization") not in ("Bearer one", "Bearer two"):
        raise Unauthenticated("no valid API key", remediation="send Authorization: Bearer KEY")
    return {"env": {"OWNER": headers["authorization"].removeprefix("Bearer ")}}


@asynccontextmanager
async def as_key(url, key):
    async with (
        httpx2.AsyncClient(headers={"authorization": f"Bearer {key}"}) as http,
        Client(streamable_http_client(url, http_client=http)) as client,
    ):
        yield client


async def test_state_charts_and_errors_cross_as_over_stdio(serve):
    async with serve() as url, Client(url) as client:
        assert len((await client.list_tools()).tools) == 12
        await client.call_tool("run_code", {"code": "x = 20"})
        assert text(await client.call_tool("run_code", {"code": "x + 1"})) == "21"
        await client.call_tool("write_file", {"path": "a", "content": "b"})
        kept = (await client.call_tool("checkpoint", {})).structured_content
        await client.call_tool("exec", {"command": "rm a"})
        await client.call_tool("rollback", kept)
        assert text(await client.call_tool("read_file", {"path": "a"})) == "b"
        failed = await client.call_tool("run_code", {"code": "1 / 0"})
        assert failed.is_error and "ZeroDivisionError" in text(failed) and failed.structured_content["status"] == "error"


@pytest.mark.data
async def test_a_chart_is_an_image_over_http_too(serve):
    code = "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"
    async with serve(lambda headers: {"policy": "data-analysis"}) as url, Client(url) as client:
        answer = await client.call_tool("run_code", {"code": code})
    assert [block.mime_type for block in answer.content if block.type == "image"] == ["image/png"]


async def test_a_session_never_reaches_another_sessions_sandbox_h14(serve):
    async with serve() as url, Client(url) as one, Client(url) as two:
        await one.call_tool("run_code", {"code": "x = 'secret of one'; open('f', 'w').write(x)"})
        theirs = (await one.call_tool("list_sandboxes", {})).structured_content["sandboxes"][0]["sandbox_id"]
        unknown = f"s{uuid.uuid4().hex[:16]}"
        for tool, arguments in (
            ("run_code", {"code": "x"}),
            ("exec", {"command": "cat f"}),
            ("read_file", {"path": "f"}),
            ("write_file", {"path": "f", "content": ""}),
            ("list_files", {}),
            ("checkpoint", {}),
            ("rollback", {"checkpoint": "a:b"}),
            ("snapshot", {}),
            ("rollback", {"checkpoint": "p0123456789abcdef"}),
            ("fork_sandbox", {"count": 1}),
            ("kill_sandbox", {}),
        ):
            answer = await two.call_tool(tool, {**arguments, "sandbox_id": theirs})
            nobodys = await two.call_tool(tool, {**arguments, "sandbox_id": unknown})
            assert answer.is_error and text(answer) == text(nobodys).replace(unknown, theirs)
        assert (await two.call_tool("list_sandboxes", {})).structured_content["sandboxes"] == []
        assert text(await one.call_tool("run_code", {"code": "x"})) == "'secret of one'"


async def test_each_session_uses_its_own_key_and_no_key_opens_none(serve):
    async with serve(by_key) as url:
        async with as_key(url, "one") as one, as_key(url, "two") as two:
            for client, name in ((one, "one"), (two, "two")):
                assert text(await client.call_tool("exec", {"command": "echo $OWNER"})) == name
        async with httpx2.AsyncClient(headers=HEADERS) as http:
            refused = await http.post(url, json=HELLO)
    assert refused.status_code == 401 and refused.json()["code"] == "unauthenticated" and refused.json()["remediation"]


async def test_a_session_id_is_worth_nothing_with_another_key(serve):
    async with serve(by_key) as url, httpx2.AsyncClient(headers=HEADERS) as http:
        opened = await http.post(url, json=HELLO, headers={"authorization": "Bearer one"})
        stolen = {"mcp-session-id": opened.headers["mcp-session-id"], "authorization": "Bearer two"}
        unknown = {"mcp-session-id": uuid.uuid4().hex, "authorization": "Bearer two"}
        asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        for method in ("POST", "GET", "DELETE"):
            body = asked if method == "POST" else None
            answers = [await http.request(method, url, json=body, headers=h) for h in (stolen, unknown)]
            assert [a.status_code for a in answers] == [404, 404] and answers[0].content == answers[1].content
        mine = {"mcp-session-id": opened.headers["mcp-session-id"], "authorization": "Bearer one"}
        assert (await http.post(url, json=asked, headers=mine)).status_code == 200


async def test_a_page_that_rebinds_its_name_to_this_address_is_refused(serve):
    async with serve() as url, httpx2.AsyncClient(headers=HEADERS) as http:
        rebound = await http.post(url, json=HELLO, headers={"host": "evil.example"})
        foreign = await http.post(url, json=HELLO, headers={"origin": "http://evil.example"})
        looks_alike = await http.post(url, json=HELLO, headers={"host": "127.0.0.1.evil.example"})
        plain = await http.post(url, json=HELLO)
    assert rebound.status_code == 421 and looks_alike.status_code == 421 and foreign.status_code == 403
    assert plain.status_code == 200


async def test_a_public_name_works_once_it_is_allowed(serve):
    async with serve(allowed_hosts=["box.example"]) as url, httpx2.AsyncClient(headers=HEADERS) as http:
        assert (await http.post(url, json=HELLO, headers={"host": "box.example"})).status_code == 200


async def _started(client, marker):
    """A program that outlives its call."""
    await client.call_tool("exec", {"command": f"exec -a {marker} sleep 600 >/dev/null 2>&1 & disown"})
    await until(lambda: marked(f"{marker}\x00600"))


async def test_the_end_of_a_session_ends_its_sandboxes_and_no_others(serve):
    one, two = uuid.uuid4().hex, uuid.uuid4().hex
    async with serve() as url, Client(url) as stays:
        await _started(stays, one)
        async with Client(url) as goes:
            await _started(goes, two)
        await until(lambda: not marked(f"{two}\x00600"))
        assert len(marked(f"{one}\x00600")) == 1
    assert not marked(f"{one}\x00600"), "the server's end is the end of every session"


async def test_a_client_that_vanishes_mid_call_without_a_word_leaves_nothing_once_its_session_is_idle(serve):
    marker = uuid.uuid4().hex
    call = {"name": "exec", "arguments": {"command": f"exec -a {marker} sleep 600", "timeout_s": 2}}
    async with serve(session_idle_s=1) as url:
        async with httpx2.AsyncClient(headers=HEADERS) as http:
            session = {"mcp-session-id": (await http.post(url, json=HELLO)).headers["mcp-session-id"]}
            await http.post(url, json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=session)
            body = {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call}
            asking = asyncio.ensure_future(http.post(url, json=body, headers=session))
            await until(lambda: marked(f"{marker}\x00600"))
            asking.cancel()
        await until(lambda: not marked(f"{marker}\x00600"), 15)
        async with httpx2.AsyncClient(headers={**HEADERS, **session}) as http:
            await asyncio.sleep(2.5)  # longer than the idle time; asking meanwhile would keep the session alive
            gone = await http.post(url, json={"jsonrpc": "2.0", "id": 3, "method": "tools/list"})
    assert gone.status_code == 404


async def test_sessions_are_limited_and_a_full_server_says_so(serve):
    async with serve(max_sessions=2) as url, httpx2.AsyncClient(headers=HEADERS) as http:
        codes = [(await http.post(url, json=HELLO)).status_code for _ in range(3)]
    assert codes == [200, 200, 503]


@pytest.mark.parametrize("body", [b"", b"garbage", b"[]", b"{}", b"[" * 10_000, b"\xff\xfe", b"null"])
async def test_what_is_no_message_is_refused_and_opens_no_session(serve, body):
    async with serve(max_sessions=1) as url, httpx2.AsyncClient(headers=HEADERS) as http:
        answer = await http.post(url, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500 and b"Traceback" not in answer.content
        assert (await http.post(url, json=HELLO)).status_code == 200


async def test_a_generation_without_sessions_is_refused_with_the_versions_that_have_them(serve):
    async with serve() as url, httpx2.AsyncClient(headers={**HEADERS, "mcp-protocol-version": "2026-07-28"}) as http:
        answer = await http.post(url, json={"jsonrpc": "2.0", "id": 1, "method": "server/discover"})
    assert answer.status_code == 400 and "2025-06-18" in answer.json()["error"]["data"]["supported"]
