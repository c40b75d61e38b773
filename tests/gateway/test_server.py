"""The server below the app, on real sockets: it bears slow, greedy and broken clients, and ends in order."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fuzz_sockets import Answer, answers, fuzz
from small_app import CLIENT_S, Client, Served, served, until
from websockets.asyncio.client import connect as websocket
from websockets.exceptions import ConnectionClosed

from fumehood.agent.wire import MAX_PAYLOAD_BYTES
from fumehood.errors import InvalidInput
from fumehood.gateway import connections, protocol, server
from fumehood.gateway.server import address_of, bind, raise_nofile

pytestmark = pytest.mark.rootless
HEAD = b"Host: here\r\n"
GET = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"\r\n"
LAST = b"GET /healthz HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + b"A" * 22 + b"==\r\n"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + KEY
SOON_S = 0.4


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Served]:
    async with served(tmp_path, header_timeout_s=SOON_S) as serving:
        yield serving


def refused(data: bytes, status: int) -> dict[str, Any]:
    """The problem document in the only answer there."""
    (answer,) = answers(data)
    problem = json.loads(answer.body)
    assert (answer.status, answer.headers[b"content-type"]) == (status, b"application/problem+json"), answer
    assert problem.keys() >= {"type", "title", "status", "detail", "code", "message", "cause", "remediation", "retryable"}
    assert problem["status"] == status and problem["request_id"].encode() == answer.headers[b"x-request-id"]
    assert answer.headers[b"connection"] == b"close"
    return problem


def statuses(data: bytes) -> list[int]:
    return [answer.status for answer in answers(data)]


async def _dribbled(client: Client, piece: bytes) -> bytes:
    """What comes back until the server closes, to a client that sends a piece every now and then."""

    async def dribble() -> None:
        with suppress(ConnectionError):
            while True:
                await client.send(piece)
                await asyncio.sleep(SOON_S / 8)

    sending = asyncio.ensure_future(dribble())
    try:
        return await client.rest()
    finally:
        sending.cancel()
        await asyncio.wait((sending,))


async def served_again(small: Served) -> None:
    for _ in range(100):
        if (await small.ask(LAST)).startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the door stayed shut")


# -- slow, greedy and silent clients


async def test_headers_that_come_byte_by_byte_are_refused_when_their_time_is_over(small: Served) -> None:
    refused(await _dribbled(await (await small.client()).send(b"GET / HTTP/1.1\r\nX-Slow: "), b"a"), 408)
    assert not small.app.scopes


async def test_who_connects_and_says_nothing_is_dropped_without_a_word(small: Served) -> None:
    assert await (await small.client()).rest() == b""


@pytest.mark.parametrize("framing", [b"Content-Length: 9\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;ext"])
async def test_a_body_that_stops_is_refused_and_its_app_is_told(small: Served, framing: bytes) -> None:
    refused(await small.ask(b"PUT /echo HTTP/1.1\r\n" + HEAD + framing), 408)
    await until(lambda: small.app.gone == 1)


async def test_a_slow_body_that_goes_on_is_taken_whole(small: Served) -> None:
    client = await small.client()
    await client.send(b"PUT /echo HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"Content-Length: 8\r\n\r\n")
    for byte in b"abcdefgh":
        await asyncio.sleep(SOON_S / 3)
        await client.send(bytes([byte]))
    assert answers(await client.rest())[0].body == b"abcdefgh"


async def test_an_app_may_let_its_client_pause_for_longer(small: Served) -> None:
    client = await small.client()
    await client.send(b"PUT /patient HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"Content-Length: 2\r\n\r\na")
    await asyncio.sleep(SOON_S * 3)
    await client.send(b"b")
    assert answers(await client.rest())[0].body == b"ab"


async def test_a_client_that_waits_for_100_continue_is_not_called_slow(small: Served) -> None:
    client = await small.client()
    await client.send(b"PUT /late HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    await asyncio.sleep(SOON_S * 3)
    small.release()
    assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert (await (await client.send(b"ab")).until(b"ab")).startswith(b"HTTP/1.1 200")


async def test_a_request_that_is_worked_on_has_no_deadline_of_ours(small: Served) -> None:
    client = await (await small.client()).send(b"GET /hold HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n")
    await asyncio.sleep(SOON_S * 3)
    small.release()
    assert answers(await client.rest())[0].body == b"held"


async def test_a_flood_of_one_endless_header_is_cut_off(small: Served) -> None:
    refused(await _dribbled(await (await small.client()).send(b"GET / HTTP/1.1\r\nX-Flood: "), b"a" * 20_000), 431)
    assert not small.app.scopes


@pytest.mark.parametrize(
    "flood",
    [
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n" + HEAD,
        LAST[:-2] + b"A: b\r\n" * 100,
        LAST[:-2] + b"A: " + b"b" * 40_000 + b"\r\n",
    ],
    ids=["target", "count", "size"],
)
async def test_too_much_head_in_one_piece_is_refused(small: Served, flood: bytes) -> None:
    refused(await small.ask(flood + b"\r\n"), 431)
    assert not small.app.scopes


async def test_a_head_just_below_the_bounds_is_served(small: Served) -> None:
    assert statuses(await small.ask(LAST[:-2] + b"A: b\r\n" * 90 + b"B: " + b"b" * 30_000 + b"\r\n\r\n")) == [200]


async def test_trailers_count_as_headers_do(small: Served) -> None:
    chunked = b"PUT /echo HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    refused(await small.ask(chunked + b"T: " + b"u" * 40_000 + b"\r\n\r\n"), 431)


async def test_trailers_do_not_become_headers(small: Served) -> None:
    chunked = b"PUT /echo HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"
    assert answers(await small.ask(chunked + b"Authorization: stolen\r\n\r\n"))[0].body == b"a"
    assert b"authorization" not in dict(small.app.scopes[0]["headers"])


async def test_a_client_that_never_reads_is_dropped(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_STALL_S", SOON_S)
    client = await small.client()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await client.send(b"GET /big HTTP/1.1\r\n" + HEAD + b"\r\n")
    await until(lambda: small.app.gone == 1)


async def test_a_slow_reader_that_goes_on_is_served(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_STALL_S", SOON_S)
    client = await (await small.client()).send(b"GET /big HTTP/1.1\r\n" + HEAD + b"\r\n")
    for _ in range(30):
        await client.reader.readexactly(1 << 20)
        await asyncio.sleep(SOON_S / 8)
    assert small.app.gone == 0


async def test_a_refused_client_that_goes_on_sending_is_cut_off(small: Served) -> None:
    client = await (await small.client()).send(b"\0\0\r\n\r\n")
    refused(await client.rest(), 400)
    with pytest.raises(ConnectionError):
        for _ in range(round(CLIENT_S / SOON_S)):
            await client.send(b"a")
            await asyncio.sleep(SOON_S)


# -- broken requests


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (os.urandom(8).hex().encode() + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: here\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: here\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : here\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET here:80 HTTP/1.1\r\nHost: here\r\n\r\n", 400),
        (b"CONNECT here:80 HTTP/1.1\r\nHost: here\r\n\r\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\na", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"PUT /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\n0\n\n", 400),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"PUT /echo HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc", 501),
        (b"POST /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\na", 501),
        (b"PUT /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 501),
        (b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: \xbf\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET /\r\n\r\n", 505),
    ],
    ids=repr,
)
async def test_what_is_no_request_of_ours_is_refused_and_closed(small: Served, request_: bytes, status: int) -> None:
    refused(await small.ask(request_), status)
    assert statuses(await small.ask(LAST)) == [200]


async def test_a_refusal_of_a_head_has_no_body(small: Served) -> None:
    (answer,) = answers(await small.ask(b"HEAD / HTTP/1.1\r\n\r\n"), to_head=True)
    assert answer.status == 400 and int(answer.headers[b"content-length"]) > 0


async def test_no_body_is_ever_read_as_a_request(small: Served) -> None:
    smuggled = b"GET /smuggled HTTP/1.1\r\n" + HEAD + b"\r\n"
    for framing in (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"Transfer-Encoding: x\r\n\r\n"):
        await small.ask(b"PUT /echo HTTP/1.1\r\n" + HEAD + framing + smuggled)
    upgrade = (
        b"PUT /echo HTTP/1.1\r\n" + HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n" % len(smuggled)
    )
    client = await (await small.client()).send(upgrade)
    await client.send(smuggled)
    refused(await client.rest(), 501)
    assert "/smuggled" not in {scope["path"] for scope in small.app.scopes}


async def test_an_upgrade_without_a_body_that_we_do_not_know_is_answered_plainly(small: Served) -> None:
    assert statuses(await small.ask(GET[:-2] + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\nPRI")) == [200]


async def test_a_clients_mistakes_are_not_logged(small: Served, caplog: pytest.LogCaptureFixture) -> None:
    for broken in (
        b"\0\0\0\r\n\r\n",
        GET[:-2] + b"Connection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"GET //[ HTTP/1.1\r\n" + HEAD + b"\r\n",
    ):
        client = await (await small.client()).send(broken)
        await client.until(b"\r\n\r\n")
        await client.close()
    assert not caplog.records


async def test_an_app_whose_request_was_refused_meanwhile_learns_it_from_its_body(
    small: Served, caplog: pytest.LogCaptureFixture
) -> None:
    late = b"PUT /late HTTP/1.1\r\nExpect: 100-continue\r\n" + HEAD
    refused(await small.ask(late + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), 400)
    small.release()
    await until(lambda: small.app.gone == 1)
    assert not caplog.records


# -- several requests on one connection


async def test_pipelined_requests_are_answered_in_their_order(small: Served) -> None:
    put = b"PUT /echo HTTP/1.1\r\n" + HEAD + b"Content-Length: 3\r\n\r\nabc"
    found = answers(await small.ask(put + GET + put + LAST))
    assert [answer.body for answer in found] == [b"abc", b'{"status":"ok"}', b"abc", b'{"status":"ok"}']


async def test_a_flood_of_pipelined_requests_is_answered_in_part_and_closed(small: Served) -> None:
    client = await small.hold(GET * 1_000)
    small.release()
    found = answers(await client.rest())
    assert found[0].body == b"held"
    assert len(found) == protocol.MAX_PIPELINED + 1 == len(small.app.scopes)


async def test_garbage_behind_a_request_never_stands_inside_its_answer(small: Served) -> None:
    client = await small.hold(b"\0\0\0")
    await asyncio.sleep(SOON_S * 2)
    small.release()
    assert [answer.body for answer in answers(await client.rest())] == [b"held"]


async def test_a_broken_body_behind_a_request_does_not_harm_its_answer(small: Served) -> None:
    broken = b"PUT /echo HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz"
    client = await small.hold(broken)
    small.release()
    assert [answer.body for answer in answers(await client.rest())] == [b"held"]


async def test_an_upgrade_behind_a_request_does_not_take_its_connection(small: Served) -> None:
    client = await small.hold(GET[:-2] + UPGRADE + b"\r\n")
    small.release()
    assert [answer.body for answer in answers(await client.rest())] == [b"held"]


async def test_the_app_learns_that_its_client_left_also_with_requests_behind_it(small: Served) -> None:
    client = await small.hold(GET)
    await client.close()
    await until(lambda: small.app.gone == 1)


async def test_a_half_closed_client_counts_as_gone(small: Served) -> None:
    client = await small.hold()
    client.writer.write_eof()
    assert await client.rest() == b""
    await until(lambda: small.app.gone == 1)


async def test_an_idle_connection_is_kept_for_longer_than_our_client_keeps_it(small: Served) -> None:
    from fumehood.client import server as ours

    client = await (await small.client()).send(GET)
    await client.until(b"}")
    await asyncio.sleep(SOON_S * 3)  # the deadline for headers is for a request that has begun
    assert statuses(await (await client.send(LAST)).rest()) == [200]
    assert ours._KEEP_S < 5 <= protocol.KEEP_ALIVE_S


@pytest.mark.parametrize("more", [b"", b"\r\n"], ids=["silent", "blank line"])
async def test_an_idle_connection_is_closed_at_last(small: Served, monkeypatch: pytest.MonkeyPatch, more: bytes) -> None:
    monkeypatch.setattr(protocol, "KEEP_ALIVE_S", SOON_S)
    client = await (await small.client()).send(GET)
    await client.until(b"}")
    assert await (await client.send(more)).rest() == b""


async def test_a_body_that_nobody_wants_any_more_is_not_awaited_for_ever(small: Served) -> None:
    client = await (await small.client()).send(b"PUT /healthz HTTP/1.1\r\n" + HEAD + b"Content-Length: 99999\r\n\r\na")
    assert statuses(await _dribbled(client, b"a")) == [200]


# -- HTTP/1.0


async def test_http_1_0_gets_its_answer_without_chunks_and_the_end_of_the_connection(small: Served) -> None:
    (stream,) = answers(await small.ask(b"GET /stream HTTP/1.0\r\n\r\n"))
    assert stream.body == b"onetwo" and b"transfer-encoding" not in stream.headers
    (known,) = answers(await small.ask(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"))
    assert known.headers[b"content-length"] == b"15" and known.headers[b"connection"] == b"close"


async def test_http_1_1_streams_in_chunks_and_a_head_has_no_body(small: Served) -> None:
    (stream,) = answers(await small.ask(b"GET /stream HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n"))
    assert stream.body == b"onetwo" and stream.headers[b"transfer-encoding"] == b"chunked"
    (head,) = answers(await small.ask(LAST.replace(b"GET", b"HEAD")), to_head=True)
    assert head == Answer(200, head.headers, b"") and b"server" not in head.headers


# -- the app's failures


async def test_an_exception_is_logged_once_and_its_client_learns_nothing_of_it(
    small: Served, caplog: pytest.LogCaptureFixture
) -> None:
    data = await small.ask(b"GET /boom HTTP/1.1\r\n" + HEAD + b"\r\n")
    assert refused(data, 500)["code"] == "internal" and b"secret" not in data
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "the secret" in caplog.text


async def test_a_stream_that_is_broken_off_is_not_whole_for_its_client_and_not_an_error_for_us(
    small: Served, caplog: pytest.LogCaptureFixture
) -> None:
    data = await small.ask(b"GET /cut HTTP/1.1\r\n" + HEAD + b"\r\n")
    assert data.endswith(b"4\r\nhalf\r\n") and not caplog.records


# -- too many


async def test_who_comes_when_it_is_full_is_told_to_come_again_and_a_place_that_is_left_is_given_on(tmp_path: Path) -> None:
    async with served(tmp_path, max_connections=3) as small:
        inside = [await (await small.client()).send(GET) for _ in range(3)]
        for client in inside:
            await client.until(b"}")
        for _ in range(10):
            data = await small.ask(GET)
            assert refused(data, 503)["retryable"] and answers(data)[0].headers[b"retry-after"] == b"1"
            await small.clients[-1].close()
        await inside.pop().close()
        await served_again(small)
        assert (await (await inside[0].send(GET)).until(b"}")).startswith(b"HTTP/1.1 200")


async def test_a_crowd_at_the_door_does_not_take_our_files(tmp_path: Path) -> None:
    async with served(tmp_path, max_connections=1) as small:
        await (await (await small.client()).send(GET)).until(b"}")
        crowd = [await small.client() for _ in range(protocol.MAX_TURNED_AWAY + 50)]
        ends = await asyncio.gather(*(client.rest() for client in crowd), return_exceptions=True)
        assert sum(isinstance(end, bytes) and end.startswith(b"HTTP/1.1 503") for end in ends) >= 1
        for client in crowd:
            await client.close()
        for client in small.clients:
            await client.close()
        await served_again(small)


def test_the_bound_of_open_files_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        assert raise_nofile() == hard == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- WebSockets


async def test_a_websocket_takes_a_whole_frame_of_the_agents_and_no_larger_message(small: Served) -> None:
    async with websocket(small.address.replace("http", "ws") + "/ws", max_size=None, compression=None) as ws:
        await ws.send("hello")
        assert await ws.recv() == "hello"
        await ws.send(bytes(MAX_PAYLOAD_BYTES + 1))
        assert await ws.recv() == str(MAX_PAYLOAD_BYTES + 1)
        with pytest.raises(ConnectionClosed) as closed:
            await ws.send(bytes(MAX_PAYLOAD_BYTES + (1 << 20)))
            await ws.recv()
    assert closed.value.rcvd and closed.value.rcvd.code == 1009


async def test_a_websocket_is_not_given_up_while_its_pong_waits_behind_a_message(
    small: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pings_often(self: connections.WebSocket) -> None:
        self.ping_interval = self.ping_timeout = SOON_S / 4
        self.schedule_ping()

    monkeypatch.setattr(connections.WebSocket, "start_keepalive", pings_often)
    async with websocket(small.address.replace("http", "ws") + "/late", compression=None) as ws:
        await ws.send("first")
        await ws.send("second")
        await asyncio.sleep(SOON_S * 4)
        small.release()
        assert [await ws.recv(), await ws.recv()] == ["first", "second"]


async def test_a_websocket_may_be_denied_without_a_word_in_the_log(small: Served, caplog: pytest.LogCaptureFixture) -> None:
    (answer,) = answers(await small.ask(b"GET /denied HTTP/1.1\r\n" + HEAD + UPGRADE + b"\r\n"))
    assert (answer.status, answer.body) == (401, b"no") and not caplog.records


async def test_a_websocket_whose_client_does_not_read_is_dropped(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "WRITE_STALL_S", SOON_S)
    client = await (await small.client()).send(b"GET /ws HTTP/1.1\r\n" + HEAD + UPGRADE + b"\r\n")
    await client.until(b"\r\n\r\n")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    with pytest.raises(ConnectionError):
        for _ in range(100_000):
            await client.send(b"\x81\xff" + (1 << 16).to_bytes(8, "big") + bytes(4) + b"a" * (1 << 16))
    await until(lambda: small.app.gone == 1)


async def test_pongs_that_nobody_reads_are_not_kept(small: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, unsent = list[int](), connections._unsent
    monkeypatch.setattr(connections, "_unsent", lambda size, *more: sizes.append(size) or unsent(size, *more))
    client = await (await small.client()).send(b"GET /push HTTP/1.1\r\n" + HEAD + UPGRADE + b"\r\n")
    await client.until(b"\r\n\r\n")
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: bool(sizes) and sizes[-1] > 1 << 16)
    for _ in range(400):
        await client.send((b"\x89\xfd" + bytes(4) + b"p" * 125) * 100)
    seen = len(sizes)
    await until(lambda: len(sizes) > seen + 3)
    assert max(sizes) < 3 << 20


# -- the end


async def test_it_answers_while_it_drains_and_only_then_closes(tmp_path: Path) -> None:
    draining, drained = threading.Event(), threading.Event()

    async def drain() -> None:
        draining.set()
        await until(drained.is_set)

    async with served(tmp_path, drained=drain) as small:
        idle = await (await small.client()).send(GET)
        await idle.until(b"}")
        working = await small.hold()
        small.stop()
        await until(draining.is_set)
        assert statuses(await small.ask(LAST)) == [200]
        drained.set()
        assert await idle.rest() == b""
        with pytest.raises(OSError):
            await small.client()
        assert not small.serving.done()
        small.release()
        assert [a.body for a in answers(await working.rest())] == [b"held"]
        async with asyncio.timeout(CLIENT_S):
            await small.serving


async def test_an_answer_that_does_not_end_is_broken_off_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLOSE_S", SOON_S)
    async with served(tmp_path) as small:
        client = await small.hold()
        small.stop()
        async with asyncio.timeout(CLIENT_S):
            await small.serving
        assert small.app.gone == 1
        with suppress(ConnectionError):  # an abort is a reset where bytes were unread
            assert await client.rest() == b""


async def test_it_closes_also_when_draining_fails(tmp_path: Path) -> None:
    async def drain() -> None:
        raise RuntimeError("no drain")

    with pytest.raises(RuntimeError, match="no drain"):
        async with served(tmp_path, drained=drain) as small:
            await (await (await small.client()).send(GET)).until(b"}")
    with pytest.raises(OSError):
        await small.client()


# -- where it listens


async def test_a_unix_socket_is_its_owners_alone_and_is_gone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.umask(0)
    try:
        sock = bind(f"unix:{path}")
        assert path.stat().st_mode & 0o777 == 0o600 and os.umask(0) == 0
        sock.close()
    finally:
        os.umask(before)
    async with served(tmp_path, f"unix:{path}") as small:  # the file of the closed one is stale
        assert small.address == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
        assert statuses(await small.ask(LAST)) == [200]
        with pytest.raises(InvalidInput, match="somebody listens"):
            bind(f"unix:{path}")
        assert statuses(await small.ask(LAST)) == [200]
    assert not path.exists()


async def test_a_file_that_somebody_put_in_the_sockets_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with served(tmp_path, f"unix:{path}") as small:
        assert statuses(await small.ask(LAST)) == [200]
        path.rename(tmp_path / "moved")
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_only_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(InvalidInput, match="another kind of file") as e:
            bind(f"unix:{tmp_path / name}")
        assert e.value.remediation
    assert (tmp_path / "file").read_text() == "precious"


WRONG = "|8470|:8470|localhost|127.0.0.1:|127.0.0.1:x|127.0.0.1:65536|127.0.0.1:-1|127.0.0.1:²|::1:80|[::1]|[127.0.0.1]:80"
NOWHERE = "192.0.2.1:0|unix:relative|unix:/no/such/dir/s|unix:/a\0b|no.such.host.invalid:80"


@pytest.mark.parametrize("listen", [*WRONG.split("|"), *NOWHERE.split("|"), "unix:/" + "a" * 200, "x" * 300 + ":80"])
def test_an_address_that_can_not_be_is_refused_with_a_way_out(listen: str) -> None:
    with pytest.raises(InvalidInput) as e:
        bind(listen)
    assert e.value.cause and e.value.remediation


@pytest.mark.parametrize(("listen", "host"), [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]"), ("0.0.0.0:0", "127.0.0.1")])
def test_a_port_of_the_systems_choice_is_told_and_is_ours_alone(listen: str, host: str) -> None:
    with bind(listen) as sock:
        port = sock.getsockname()[1]
        assert address_of(sock, listen) == f"http://{host}:{port}"
        with pytest.raises(InvalidInput, match="in use") as e:
            bind(listen.replace(":0", f":{port}"))
        assert "another address" in e.value.remediation


# -- whatever comes


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
async def test_it_stays_well_under_mutated_requests(tmp_path: Path, listen: str, caplog: pytest.LogCaptureFixture) -> None:
    async with served(tmp_path, f"unix:{tmp_path}/s" if listen == "unix" else listen, header_timeout_s=SOON_S) as small:
        paths = ["/healthz", "/echo", "/stream", "/echo?a=%41"]
        seen = await asyncio.to_thread(fuzz, small.address, 150, 1, [("X-API-Key", "fh_0")], paths=paths, pid=os.getpid())
    assert seen.keys() >= {200, 400}, seen
    assert not caplog.records
