"""HTTP below the app, on real sockets: slow, greedy and broken clients harm neither it nor each other."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from fuzz_sockets import Answer, answers
from small_app import CLIENT_S, Served, served, until
from spoken import GET, HEAD, LAST, SOON_S, UPGRADE, dribbled, refused, statuses

from fumehood.gateway import connections, protocol


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Served]:
    async with served(tmp_path, header_timeout_s=SOON_S) as serving:
        yield serving


# -- slow, greedy and silent clients


async def test_headers_that_come_byte_by_byte_are_refused_when_their_time_is_over(small: Served) -> None:
    refused(await dribbled(await (await small.client()).send(b"GET / HTTP/1.1\r\nX-Slow: "), b"a"), 408)
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
    refused(await dribbled(await (await small.client()).send(b"GET / HTTP/1.1\r\nX-Flood: "), b"a" * 20_000), 431)
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
    assert statuses(await dribbled(client, b"a")) == [200]


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
