"""Whatever answers at the address: a typed error, bounded memory, and no request repeated that must not be."""

from __future__ import annotations

import dataclasses
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scripted import SANDBOX, Answer, Asked, Scripted, answer, head

from fumehood import Sandbox
from fumehood.client import remote
from fumehood.client.address import Address
from fumehood.client.sse import events
from fumehood.errors import FileFault, FumehoodError, InvalidInput, PolicyError, RateLimited, ServerUnreachable
from fumehood.model import Result
from fumehood.policy.resolve import resolve

GOOD = json.dumps(dataclasses.asdict(Result("ok", stdout="done"))).encode()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "unix:/nowhere/at/all.sock"])
def test_a_server_that_is_not_there_is_named_with_what_to_do(url: str) -> None:
    with pytest.raises(ServerUnreachable, match="no answer from the server") as raised:
        Sandbox(url=url).open()
    assert raised.value.cause and "fumehood serve" in raised.value.remediation and raised.value.retryable


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8470",
        "ftp://x",
        "http://",
        "http://u:p@h",
        "http://h?q=1",
        "http://h:99999",
        "unix:relative",
        "http://a b",
        "x",
    ],
)
def test_an_address_that_names_no_server_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="bad url"):
        Sandbox(url=url)


@pytest.mark.parametrize("key", ["a\r\nX-Other: b", "k 7", "é", "a\0"])
def test_a_key_can_not_smuggle_headers_and_is_never_shown(key: str) -> None:
    with pytest.raises(InvalidInput, match="api_key") as raised:
        Sandbox(url="http://127.0.0.1:1", api_key=key)
    assert key not in str(raised.value)
    assert "secret" not in repr(Address.read("http://h", "secret"))


def test_a_run_whose_connection_is_reset_is_asked_once_more_under_the_same_key() -> None:
    def flaky(asked: Asked) -> Answer:
        return None if len(server.later) == 1 else answer(GOOD)

    with Scripted(flaky) as server, Sandbox(url=server.url) as box:
        assert box.run("1").stdout == "done"
    first, second = server.later
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] and first.body == second.body


def test_two_runs_never_share_an_idempotency_key() -> None:
    with Scripted(lambda _: answer(GOOD)) as server, Sandbox(url=server.url) as box:
        box.run("1"), box.run("1"), box.exec("true")
    assert len({a.headers["idempotency-key"] for a in server.asked if a.method == "POST"}) == 4


def test_a_server_that_resets_every_connection_is_given_up_after_two() -> None:
    with Scripted(lambda _: None) as server, Sandbox(url=server.url) as box, pytest.raises(ServerUnreachable):
        box.run("1")
    assert len(server.later) == 2


def test_what_is_not_idempotent_is_never_asked_twice() -> None:
    with Scripted(lambda _: None) as server, Sandbox(url=server.url) as box:
        with pytest.raises(ServerUnreachable):
            box.contexts.interrupt("python")
        with pytest.raises(ServerUnreachable):
            box.pause()
    assert [a.path.rsplit("/", 1)[1] for a in server.later] == ["interrupt", "pause"]


def test_an_answer_that_breaks_off_is_no_result_and_not_asked_again() -> None:
    half = head(200, "transfer-encoding: chunked") + b'5\r\n{"sta\r\n'
    with Scripted(lambda _: half) as server, Sandbox(url=server.url) as box, pytest.raises(ServerUnreachable):
        box.run("1")
    assert len(server.later) == 1


def test_a_stream_that_ends_before_the_run_is_no_result() -> None:
    said = head(200, "content-type: text/event-stream") + b'event: stdout\ndata: {"text": "half"}\n\n'
    seen: list[str] = []
    with Scripted(lambda _: said) as server, Sandbox(url=server.url) as box, pytest.raises(ServerUnreachable):
        box.run("1", on_stdout=seen.append)
    assert seen == ["half"]


def test_an_endless_answer_is_cut_off() -> None:
    endless = head(200, "transfer-encoding: chunked") + (b"400000\r\n" + b"x" * (4 << 20) + b"\r\n") * 17
    refused = pytest.raises(ServerUnreachable, match="more than 67108864 bytes")
    with Scripted(lambda _: endless) as server, Sandbox(url=server.url) as box, refused:
        box.stats()


@pytest.mark.parametrize(
    "said",
    [
        answer(b"<html>502</html>", 502),
        answer(b"<html>hello</html>"),
        answer(b"[1, 2]"),
        answer(b"[" * 100_000),
        answer(b"\xff\xfe"),
        answer({"status": "a word that is none", "stdout": ""}),
        answer({"status": "ok", "usage": "much"}),
        answer({"detail": "some other program"}, 404),
        head(307, "location: http://127.0.0.1:1/", "content-length: 0"),
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ],
)
def test_what_does_not_speak_as_fumehood_is_called_so(said: bytes) -> None:
    with Scripted(lambda _: said) as server, Sandbox(url=server.url) as box, pytest.raises(ServerUnreachable) as raised:
        box.run("1")
    assert raised.value.cause


@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_a_redirect_does_not_carry_the_key_elsewhere(scheme: str) -> None:
    with (
        Scripted() as other,
        Scripted(lambda _: head(307, f"location: {scheme}{other.url.removeprefix('http')}/", "content-length: 0")) as server,
        Sandbox(url=server.url, api_key="k1") as box,
    ):
        for work in (lambda: box.run("1"), lambda: box.stats(), lambda: box.start(["true"])):
            with pytest.raises(ServerUnreachable):
                work()
    assert server.asked[0].headers["authorization"] == "Bearer k1" and other.asked == []


def test_a_problem_is_the_error_that_an_embedded_sandbox_would_raise_with_all_it_says() -> None:
    said = {"code": "file_error", "message": "m", "cause": "c", "remediation": "r", "details": {"errno": "ENOSPC", "self": 1}}
    with Scripted(lambda _: answer({**said, "request_id": "q1"}, 409)) as server:
        box = Sandbox(url=server.url).open()
        with pytest.raises(FileFault) as raised:
            box.files.mkdir("x")
        box.close()
    error = raised.value
    assert (error.message, error.cause, error.remediation) == ("m", "c", "r")
    assert error.details == {"errno": "ENOSPC", "self": 1, "request_id": "q1"}


def test_a_problem_in_the_stream_is_raised_and_an_unknown_code_is_kept() -> None:
    stream = head(200, "content-type: text/event-stream") + b'event: problem\ndata: {"code": "rate_limited"}\n\n'
    with Scripted(lambda _: stream) as server, Sandbox(url=server.url) as box:
        with pytest.raises(RateLimited):
            box.run("1", on_stdout=print)
        server.on_request = lambda _: answer({"code": "of_tomorrow", "retryable": True}, 418)
        with pytest.raises(FumehoodError) as raised:
            box.run("1")
    assert (raised.value.code, raised.value.retryable) == ("of_tomorrow", True)


def test_a_server_that_no_longer_keeps_deadlines_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MARGIN_S", 0.2)
    given_up = pytest.raises(ServerUnreachable, match=r"said nothing for 0\.2 s")
    with socket.create_server(("127.0.0.1", 0)) as silent, given_up:
        Sandbox(url=f"http://127.0.0.1:{silent.getsockname()[1]}").open()


def test_a_policy_is_read_here_and_means_the_same_there(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'extends = "strict"\n[limits]\nmemory = "64MiB"\n'.replace("memory =", "memory_bytes =")
    )
    own = tmp_path / "own.toml"
    own.write_text('name = "own"\nextends = "./base.toml"\nrequire = ["seccomp"]\n[files]\nhidden = ["/srv"]\n')
    with Scripted() as server, Sandbox(url=server.url, policy=own, limits={"pids": 9}):
        pass
    sent: dict[str, Any] = server.asked[0].json
    assert str(tmp_path) not in json.dumps(sent) and sent["limits"] == {"pids": 9}
    assert resolve(sent["policy"]).policy_hash == resolve(own).policy_hash
    with pytest.raises(PolicyError):
        Sandbox(url="http://127.0.0.1:1", policy=tmp_path / "none.toml")


def test_a_preset_is_the_servers_own_and_a_template_object_can_not_travel() -> None:
    with (
        Scripted() as server,
        Sandbox(url=server.url, policy="of-that-server", metadata={"a": "b"}, lease_s=5, on_expiry="pause"),
    ):
        pass
    assert server.asked[0].json == {"policy": "of-that-server", "metadata": {"a": "b"}, "lease_s": 5, "on_expiry": "pause"}
    with pytest.raises(InvalidInput, match="Template"):
        Sandbox(url="http://127.0.0.1:1", template=resolve("default").template)


@pytest.mark.parametrize("words", [{"lease_s": 5}, {"on_expiry": "pause"}, {"auto_resume": True}])
def test_what_only_a_server_keeps_is_refused_without_one(words: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(words))):
        Sandbox(url="", **words)


@pytest.mark.parametrize("work", [lambda b: b.run("1", timeout_s=float("nan")), lambda b: b.run("1", env={"A": object()})])
def test_what_json_can_not_say_is_refused_before_it_is_sent(work: Any) -> None:
    with Scripted() as server, Sandbox(url=server.url) as box, pytest.raises(InvalidInput):
        work(box)
    assert server.later == []


@pytest.mark.parametrize("name", ["../../keys", "a/b", "..", "", "a?b=c", "\ud800", "%2e%2e"])
def test_an_id_stays_one_part_of_the_path_h14(name: str) -> None:
    with Scripted() as server, Sandbox(url=server.url) as box:
        box.contexts.restart(name)
    path = server.later[0].path
    assert path.startswith("/v1/sandboxes/s0123456789abcdef/contexts/") and path.count("/") == 6 and ".." not in path
    with pytest.raises(InvalidInput):
        Sandbox.connect("../" + name, url=server.url)


@pytest.mark.parametrize("page", [{"sandboxes": [], "next": "s9"}, {"sandboxes": [SANDBOX] * 60, "next": "s9"}])
def test_a_list_whose_pages_never_end_ends_at_the_limit(page: dict[str, Any]) -> None:
    with Scripted(lambda _: answer(page)) as server:
        assert len(Sandbox.list(url=server.url, limit=100)) in (0, 100)
    assert len(server.later) <= 2


async def test_events_are_the_same_however_the_bytes_are_cut() -> None:
    text = b': alive\n\nevent: stdout\ndata: {"text": "a\\nb"}\n\ndata: {"event": "end"}\r\n\r\nevent: x\ndata: {}\n\n'

    async def cut(size: int) -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    wanted = [("stdout", {"text": "a\nb"}), ("end", {"event": "end"}), ("x", {})]
    for size in range(1, len(text) + 1):
        assert [e async for e in events("u", cut(size), 100)] == wanted


async def test_an_event_without_end_is_refused() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"data: xxxxxxxxxxxxxxxxxxxx"

    with pytest.raises(ServerUnreachable, match="more than 1000 bytes"):
        async for _ in events("u", endless(), 1000):
            pass
