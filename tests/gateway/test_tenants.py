"""Tenants can't see each other: not by an id, a list, an event, a figure or an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import SSE, events, problem, run, socket
from websockets.exceptions import InvalidStatus

from fumehood.records import SnapshotRecord
from fumehood.store import Store

UNKNOWN = {"sandbox_id": "s0123456789abcdef", "execution_id": "e" + "0" * 24, "snapshot_id": "p" + "0" * 16}
UNKNOWN_BOX, UNKNOWN_RUN = UNKNOWN["sandbox_id"], UNKNOWN["execution_id"]
BODIES: dict[str, Any] = {
    "sandboxes_extend": {"lease_s": 60},
    "sandboxes_checkpoint": {},
    "sandboxes_rollback": {"checkpoint": "python:check1"},
    "sandboxes_fork": {"count": 1},
    "snapshots_create": {},
    "executions_run": {"code": "1"},
    "executions_exec": {"argv": ["true"]},
    "contexts_create_context": {"language": "python"},
    "processes_signal": {"signal": 9},
    "processes_resize": {"rows": 24, "cols": 80},
    "files_mkdir": {"path": "d"},
    "files_move": {"source": "a", "destination": "b"},
    "files_sign": {"path": "f"},
}
LISTED = ("execution_id", "snapshot_id")
SOCKETS = ("/processes", "/processes/1", "/files/watch?path=/", "/executions/stream")
Route = tuple[str, str, str]


@pytest.fixture(scope="module")
def hers(alice: httpx.Client, home: Path) -> Iterator[dict[str, str]]:
    """A sandbox and an execution of Alice's, and names in them that only she can know."""
    made = alice.post("/v1/sandboxes", json={"metadata": {"who": "canary-metadata"}}).raise_for_status().json()
    path = f"/v1/sandboxes/{made['id']}"
    alice.put(f"{path}/files", params={"path": "canary-file"}, content=b"canary-content").raise_for_status()
    alice.post(f"{path}/executions", json={"code": "print('canary-output')", "wait": False}).raise_for_status()
    known = alice.get("/v1/executions", params={"sandbox_id": made["id"]}).json()["executions"]
    kept = snapshot_of(home, made)
    yield {"sandbox_id": made["id"], "execution_id": known[0]["id"], "snapshot_id": kept, "path": path}
    alice.delete(path)


def snapshot_of(home: Path, box: dict[str, Any]) -> str:
    """Its record alone, as this tier makes none: whose it is, is looked at before anything else."""

    async def put() -> str:
        kept = SnapshotRecord(
            "p0123456789abcdef", "alice", box["key_id"], box["id"], "qemu", "python", "default", "", "{}", "ready", 1.0, 1,
            {"who": "canary-snapshot"},
        )  # fmt: skip
        store = await Store.open(home / "state/store.db", exclusive=False)
        await store.snapshots.put(kept)
        await store.aclose()
        return kept.id

    return asyncio.run(put())


def routes(http: httpx.Client, *placeholders: str) -> list[Route]:
    """Method, path and operation id of each that names one of those."""
    paths = http.get("/openapi.json").json()["paths"]
    found = [(method.upper(), path, asked["operationId"]) for path in paths for method, asked in paths[path].items()]
    return [route for route in found if any(f"{{{name}}}" in route[1] for name in placeholders)]


def ask(http: httpx.Client, route: Route, ids: dict[str, str]) -> tuple[int, str]:
    """What is answered, with the id and the request id taken out."""
    method, path, operation = route
    url = path.format(**{"context": "python", "pid": 1, **ids})
    answer = http.request(method, url, params={"path": "canary-file"} if "/files" in url else {}, json=BODIES.get(operation))
    problem(answer, 404, "not_found")
    shown = answer.text.replace(answer.headers["x-request-id"], "R")
    for name in ids.values():
        shown = shown.replace(name, "ID")
    return answer.status_code, shown


def test_every_route_with_an_id_says_of_anothers_what_it_says_of_an_unknown_one(
    alice: httpx.Client, robert: httpx.Client, hers: dict[str, str]
) -> None:
    ids = {name: hers[name] for name in UNKNOWN}
    found = routes(robert, *ids)
    assert len(found) >= 31 and {operation for _, _, operation in found} >= BODIES.keys()
    for route in found:
        theirs, nobodys = ask(robert, route, ids), ask(robert, route, UNKNOWN)
        assert theirs == nobodys, route
    assert alice.get(hers["path"]).json()["state"] in ("ready", "running")
    assert alice.get(f"{hers['path']}/files", params={"path": "canary-file"}).text == "canary-content"
    assert alice.get(f"/v1/snapshots/{hers['snapshot_id']}").json()["metadata"] == {"who": "canary-snapshot"}


@pytest.mark.parametrize("end", SOCKETS)
def test_every_socket_refuses_anothers_sandbox_as_an_unknown_one(robert: httpx.Client, hers: dict[str, str], end: str) -> None:
    said: list[tuple[int, dict[str, Any]]] = []
    for sandbox_id in (hers["sandbox_id"], UNKNOWN_BOX):
        with pytest.raises(InvalidStatus) as refused:
            socket(robert, f"/v1/sandboxes/{sandbox_id}{end}")
        response = refused.value.response
        told = json.loads(response.body.decode().replace(sandbox_id, "ID"))
        said.append((response.status_code, {**told, "request_id": ""}))
    assert said[0] == said[1] and said[0][0] == 404


def _places(known: dict[str, str]) -> list[dict[str, str]]:
    """Where each list may be told to begin."""
    box = known["sandbox_id"]
    return [{"after": box}, *({"after": known[name], "sandbox_id": box} for name in LISTED)]


def test_a_snapshot_of_another_tenant_makes_no_sandbox(robert: httpx.Client, hers: dict[str, str]) -> None:
    said = [robert.post("/v1/sandboxes", json={"snapshot": known["snapshot_id"]}) for known in (hers, UNKNOWN)]
    texts = [problem(answer, 404, "not_found")["message"] for answer in said]
    assert texts[0].replace(hers["snapshot_id"], UNKNOWN["snapshot_id"]) == texts[1]
    assert robert.get("/v1/sandboxes").json()["sandboxes"] == []


def test_lists_hold_nothing_of_another_tenant_wherever_they_begin(robert: httpx.Client, hers: dict[str, str]) -> None:
    theirs, nobodys = (_places(known) for known in (hers, UNKNOWN))
    for at, asked in enumerate(("/v1/sandboxes", "/v1/executions", "/v1/snapshots")):
        for state in ({}, {"state": "stopped"}) if at == 0 else ({},):
            shown = [robert.get(asked, params={**state, **more}) for more in ({}, theirs[at], nobodys[at])]
            assert all("canary" not in s.text and "alice" not in s.text for s in shown)
            assert (shown[1].status_code, shown[1].json().get(asked[4:])) == (
                shown[2].status_code,
                shown[2].json().get(asked[4:]),
            )


def test_the_end_of_anothers_sandbox_is_no_news(alice: httpx.Client, robert: httpx.Client, box: str) -> None:
    alice.delete(box).raise_for_status()
    problem(alice.get(f"{box}/files", params={"path": "x"}), 410, "sandbox_gone")
    problem(robert.get(f"{box}/files", params={"path": "x"}), 404, "not_found")
    problem(robert.get(box), 404, "not_found")


def test_events_are_those_of_ones_own_tenant(alice: httpx.Client, robert: httpx.Client, admin: httpx.Client) -> None:
    with (
        robert.stream("GET", "/v1/events", headers={"last-event-id": "0"}) as his,
        admin.stream("GET", "/v1/events", params={"all": "true"}) as every,
    ):
        heard, all_heard = events(his), events(every)
        assert next(heard) == next(all_heard) == ("", {})
        for http in (alice, robert):
            path = "/v1/sandboxes/" + http.post("/v1/sandboxes", json={}).raise_for_status().json()["id"]
            run(http, path, "1")
            http.delete(path).raise_for_status()
        his_own = [next(heard) for _ in range(3)]
        of_all = [next(all_heard) for _ in range(6)]
    assert [kind for kind, _ in his_own] == ["sandbox.started", "execution.done", "sandbox.stopped"]
    assert {data["tenant"] for _, data in his_own} == {"robert"}
    assert [data["tenant"] for _, data in of_all] == ["alice"] * 3 + ["robert"] * 3


def test_figures_and_status_name_no_tenant_s_words(alice: httpx.Client, admin: httpx.Client, hers: dict[str, str]) -> None:
    for path in ("/metrics", "/v1/status"):
        text = admin.get(path).raise_for_status().text
        assert "canary" not in text and hers["sandbox_id"] not in text and hers["execution_id"] not in text


def test_metrics_name_no_tenant(admin: httpx.Client, hers: dict[str, str]) -> None:
    assert not any(name in admin.get("/metrics").text for name in ("alice", "robert"))


def test_a_running_execution_of_another_tenant_can_not_be_cancelled(
    alice: httpx.Client, robert: httpx.Client, box: str
) -> None:
    with alice.stream(
        "POST", f"{box}/executions", json={"code": "print(1, flush=True); import time; time.sleep(0.5)"}, headers=SSE
    ) as stream:
        heard = events(stream)
        assert [next(heard)[0], next(heard)[0]] == ["started", "stdout"]
        name = alice.get("/v1/executions", params={"sandbox_id": box[14:]}).json()["executions"][0]["id"]
        problem(robert.delete(f"/v1/executions/{name}"), 404, "not_found")
        assert list(heard)[-1][1]["result"]["status"] == "ok"
