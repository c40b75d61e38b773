"""The load run can fail: each way of losing a request, of mixing two up and of leaving something is found out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from bench.load import operations
from bench.load.http import Client, Gone, Reply
from bench.load.ledger import Ledger, clean_refusal, reconcile
from bench.load.pace import Pace
from bench.load.page import SERVICE
from bench.load.targets import TARGETS, verdicts
from bench.load.tenants import Session, Tenant
from bench.page import write as write_page

Answer = Callable[[bytes], bytes]
RESULT = {"status": "ok", "cause": "", "sandbox_id": "s1", "stdout": ""}


class Served(asyncio.Protocol):
    """A connection whose every request gets the one answer, made from its body; b"" hangs up."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._got = answer, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        head, end, body = (self._got + data).partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        self._got = self._got + data if not end or len(body) < length else b""
        if not self._got:
            self._reply(self._answer(body))

    def _reply(self, raw: bytes) -> None:
        assert isinstance(self._transport, asyncio.Transport)
        if raw:
            self._transport.write(raw)
        else:
            self._transport.abort()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Client]:
    server = await asyncio.get_running_loop().create_server(lambda: Served(answer), "127.0.0.1", 0)
    client = Client("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield client
    finally:
        client.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)  # the transports of both sides hear of their end


def reply(status: int, body: Any, *headers: str) -> bytes:
    raw = json.dumps(body).encode()
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, f"Content-Length: {len(raw)}", "", ""]).encode() + raw


def said(text: str, status: str = "ok") -> bytes:
    return reply(200, RESULT | {"stdout": text, "status": status})


PROBLEM = "Content-Type: application/problem+json"


@pytest.mark.parametrize(
    ("answer", "fate"),
    [
        (lambda body: said(json.loads(body)["code"].split("'")[1] + "\n"), "answered"),
        (lambda body: said("somebody else's\n"), "wrong_owner"),
        (lambda body: said(""), "unexpected"),
        (lambda body: said(json.loads(body)["code"].split("'")[1], "timeout"), "unexpected"),
        (lambda body: reply(429, {}, PROBLEM, "Retry-After: 3"), "refused"),
        (lambda body: reply(429, {}, PROBLEM), "lost"),
        (lambda body: reply(429, {}, "Retry-After: 3"), "lost"),
        (lambda body: reply(500, {}, PROBLEM, "Retry-After: 3"), "lost"),
        (lambda body: b"", "lost"),
        (lambda body: b"not HTTP at all\r\n\r\n", "lost"),
    ],
    ids=["own", "another's", "nothing", "timeout", "429", "no retry-after", "no problem", "500", "hang up", "garbage"],
)
async def test_every_answer_has_one_fate(answer: Answer, fate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.tenants.ANSWER_S", 0.3)
    async with serving(answer) as client:
        tenant = Tenant("one", client)
        await operations.one_shot(tenant)
    assert sum(tenant.ledger.fates.values()) == 1
    assert tenant.ledger.fates["one shot", fate] == 1


async def test_an_answer_that_never_ends_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.load.tenants.ANSWER_S", 0.2)
    async with serving(lambda body: said("x")[:-5]) as client:
        tenant = Tenant("one", client)
        await operations.one_shot(tenant)
    assert tenant.ledger.fates["one shot", "lost"] == 1


async def test_another_sessions_state_is_found_out() -> None:
    async with serving(lambda body: said("deadbeef 1\n")) as client:
        tenant = Tenant("one", client)
        assert not await tenant.run(Session("s1", "cafe", 1), "recall", "print(mine, turns)", "cafe 1\n")
    assert tenant.ledger.fates["recall", "wrong_owner"] == 1


def record(id: str, sandbox: str = "s1", state: str = "done", status: str = "ok") -> dict[str, str]:
    return {"id": id, "sandbox_id": sandbox, "state": state, "status": status}


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ([record("a"), record("b")], []),
        ([record("a")], ["s1 has 1 records for 2 to 2 executions"]),
        ([record("a"), record("b"), record("c")], ["s1 has 3 records for 2 to 2 executions"]),
        ([record("a"), record("a")], ["2 records with the id a"]),
        ([record("a"), record("b", state="running")], ["b is still running"]),
        (
            [record("a"), record("b"), record("c", "s9")],
            ["1 records of sandboxes that are not this tenant's; 0 may be"],
        ),
    ],
    ids=["right", "missing", "too many", "doubled", "unfinished", "foreign"],
)
def test_records_are_held_against_what_was_asked(found: list[dict[str, str]], wrong: list[str]) -> None:
    ledger = Ledger()
    ledger.answered["s1"] = 2
    assert reconcile(ledger, found) == wrong


def test_a_run_that_was_cut_off_must_be_recorded_as_cancelled() -> None:
    ledger = Ledger()
    ledger.answered["s1"] = 1
    ledger.cut_off.add("a")
    assert reconcile(ledger, [record("a", status="cancelled")]) == []
    assert reconcile(ledger, [record("a")]) == ["a, cut off by us, is ok"]
    assert len(reconcile(ledger, [])) == 2


async def test_work_starts_at_its_times_however_slow_it_is_and_failures_are_kept() -> None:
    pace, gate = Pace(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise ValueError("broken generator")

    await pace.run(0.1, 100, work)
    assert (pace.started, pace.most) == (10, 10)
    gate.set()
    assert await pace.drain(1.0) == 0
    assert pace.report()["failures"] == ["ValueError: broken generator"] * 10


async def test_a_refused_connection_is_no_answer() -> None:
    async with serving(lambda body: b"") as client:
        with pytest.raises(Gone):
            await client.ask("GET", "/healthz")
    with pytest.raises(OSError):
        await client.ask("GET", "/healthz")


def test_every_target_is_reported_even_when_nothing_was_measured() -> None:
    assert [v["value"] for v in verdicts({})] == [None] * len(TARGETS)


def test_a_refusal_names_what_is_wrong_with_it() -> None:
    good = {"content-type": "application/problem+json", "retry-after": "1"}
    assert clean_refusal(Reply(429, good)) == ""
    assert clean_refusal(Reply(503, good)) == ""
    assert "404" in clean_refusal(Reply(404, good))


def test_make_bench_keeps_the_section_of_the_service(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# old\n\n{SERVICE}\n\nkept\n")
    machine = {"cpus": 2, "cpu": "x", "memory_mib": 1024, "kernel": "6", "cgroup": "v2", "python": "3", "uid": 0}
    write_page(
        {"machine": machine, "date": "d", "contended": "", "targets": [], "rows": [], "absent": {}}, tmp_path / "r.json", page
    )
    assert page.read_text().endswith(f"\n\n{SERVICE}\n\nkept\n")
    assert "# old" not in page.read_text()
