"""The server around the app: its failures, too many clients, WebSockets, where it listens, and its end in order."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path

import pytest
from fuzz_sockets import answers, fuzz
from small_app import CLIENT_S, Served, served, until
from spoken import GET, HEAD, LAST, SOON_S, UPGRADE, refused, served_again, statuses
from websockets.asyncio.client import connect as websocket
from websockets.exceptions import ConnectionClosed

from fumehood.agent.wire import MAX_PAYLOAD_BYTES
from fumehood.errors import InvalidInput
from fumehood.gateway import connections, protocol, server
from fumehood.gateway.server import address_of, bind, raise_nofile

pytestmark = pytest.mark.rootless


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Served]:
    async with served(tmp_path, header_timeout_s=SOON_S) as serving:
        yield serving


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
