"""Leases: when a sandbox ends, pauses and goes on by itself, and what is told of it afterwards (H17, H19)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from callers import SSE, events, eventually, problem, run

SETTINGS = {"pool_floor": 2, "max_lifetime_s": 3_600}
LATE_S = 5.0


def make(http: httpx.Client, **asked: Any) -> str:
    return f"/v1/sandboxes/{http.post('/v1/sandboxes', json=asked).raise_for_status().json()['id']}"


def shown(http: httpx.Client, box: str) -> dict[str, Any]:
    found: dict[str, Any] = http.get(box).raise_for_status().json()
    return found


def is_now(http: httpx.Client, box: str, state: str) -> dict[str, Any]:
    found: dict[str, Any] = eventually(lambda: (s := shown(http, box))["state"] == state and s, LATE_S)
    return found


@pytest.fixture
def pausing(alice: httpx.Client) -> Iterator[str]:
    """A sandbox that its expired lease has paused, with a variable in it."""
    path = make(alice, lease_s=60, on_expiry="pause")
    run(alice, path, "x = 5")
    alice.patch(path, json={"lease_s": 0.05}).raise_for_status()
    is_now(alice, path, "paused")
    yield path
    alice.delete(path)


def test_a_lease_that_is_over_ends_the_sandbox_and_what_runs_in_it(alice: httpx.Client) -> None:
    box = make(alice, lease_s=60)
    with alice.stream("POST", f"{box}/executions", json={"code": "print(1); import time; time.sleep(60)"}, headers=SSE) as s:
        heard = events(s)
        assert [next(heard)[0], next(heard)[0]] == ["started", "stdout"]
        alice.patch(box, json={"lease_s": 0.2}).raise_for_status()
        kind, data = list(heard)[-1]
    assert (kind, data["result"]["status"]) == ("end", "killed") and "lease" in data["result"]["cause"]
    ended = shown(alice, box)
    assert (ended["state"], ended["cause"]) == ("stopped", "its lease is over") and abs(
        ended["ended_at"] - ended["end_at"]
    ) < LATE_S


def test_of_one_that_ended_everything_says_why_and_the_history_keeps_it(alice: httpx.Client) -> None:
    box = make(alice, metadata={"job": "7"})
    alice.delete(box).raise_for_status()
    for method, end, body in (
        ("POST", "/executions", {"code": "1"}),
        ("POST", "/pause", None),
        ("GET", "/stats", None),
        ("PATCH", "", {"lease_s": 60}),
        ("DELETE", "", None),
    ):
        said = problem(alice.request(method, box + end, json=body), 410, "sandbox_gone")
        assert said["cause"] == "killed by its owner"
    stopped = alice.get("/v1/sandboxes", params={"state": "stopped"}).json()["sandboxes"]
    assert {"id": box[14:], "metadata": {"job": "7"}}.items() <= stopped[0].items()
    assert box[14:] not in {s["id"] for s in alice.get("/v1/sandboxes").json()["sandboxes"]}


def test_a_lease_is_extended_and_shortened_from_now_on(alice: httpx.Client, box: str) -> None:
    for lease_s in (600.0, 30.0):
        before = time.time()
        end_at = alice.patch(box, json={"lease_s": lease_s}).raise_for_status().json()["end_at"]
        assert before + lease_s <= end_at <= time.time() + lease_s
    problem(alice.patch(box, json={"lease_s": 3_601}), 422, "invalid_input")
    assert shown(alice, box)["state"] == "ready"


@pytest.mark.parametrize(
    ("lease_s", "on_expiry", "state"), [(0, "kill", "stopped"), (-5, "kill", "stopped"), (0, "pause", "paused")]
)
def test_a_lease_of_nothing_is_over_at_once(alice: httpx.Client, lease_s: float, on_expiry: str, state: str) -> None:
    box = make(alice, on_expiry=on_expiry)
    assert alice.patch(box, json={"lease_s": lease_s}).raise_for_status().json()["state"] == state
    alice.delete(box)


def test_one_that_pauses_keeps_all_and_refuses_traffic_until_it_is_resumed(alice: httpx.Client, pausing: str) -> None:
    problem(alice.post(f"{pausing}/executions", json={"code": "x"}), 409, "invalid_transition")
    assert pausing[14:] in {s["id"] for s in alice.get("/v1/sandboxes", params={"state": "paused"}).json()["sandboxes"]}
    alice.patch(pausing, json={"lease_s": 60}).raise_for_status()
    assert alice.post(f"{pausing}/resume").raise_for_status().json()["state"] == "ready"
    assert run(alice, pausing, "x")["results"][0]["data"]["text/plain"] == "5"


@pytest.mark.parametrize("traffic", ["code", "a file", "a list"])
def test_traffic_wakes_one_that_may_be_woken_under_a_new_lease(alice: httpx.Client, traffic: str) -> None:
    box = make(alice, lease_s=60, on_expiry="pause", auto_resume=True)
    run(alice, box, "open('f', 'w').write('x')")
    alice.post(f"{box}/pause").raise_for_status()
    before = time.time()
    asked = {"code": ("POST", "/executions"), "a file": ("GET", "/files?path=f"), "a list": ("GET", "/contexts")}[traffic]
    alice.request(asked[0], box + asked[1], json={"code": "1"} if traffic == "code" else None).raise_for_status()
    woken = shown(alice, box)
    assert woken["state"] == "ready" and before + 60 <= woken["end_at"] <= time.time() + 60
    alice.delete(box).raise_for_status()


def test_to_look_at_one_that_is_paused_does_not_wake_it(alice: httpx.Client) -> None:
    box = make(alice, auto_resume=True)
    alice.post(f"{box}/pause").raise_for_status()
    for path in (box, f"{box}/stats", "/v1/sandboxes"):
        alice.get(path).raise_for_status()
    assert shown(alice, box)["state"] == "paused"
    alice.delete(box).raise_for_status()


def test_a_pause_stops_the_clock_of_the_lease(alice: httpx.Client) -> None:
    box = make(alice, lease_s=1.5)
    alice.post(f"{box}/pause").raise_for_status()
    time.sleep(1.6)
    assert shown(alice, box)["state"] == "paused"
    resumed = alice.post(f"{box}/resume").raise_for_status().json()
    assert 0 < resumed["end_at"] - time.time() <= 1.5
    is_now(alice, box, "stopped")


def test_a_pause_stands_still_and_goes_on_where_it_was(alice: httpx.Client, box: str) -> None:
    code = "import time\nfor n in range(1000):\n print(n, flush=True); time.sleep(0.01)\n if n == 40: break"
    with alice.stream("POST", f"{box}/executions", json={"code": code}, headers=SSE) as stream:
        heard = events(stream)
        assert [next(heard)[0], next(heard)[0]] == ["started", "stdout"]
        alice.post(f"{box}/pause").raise_for_status()
        used = [alice.get(f"{box}/stats").json()["usage"]["cpu_s"] for _ in range(3) if time.sleep(0.1) is None]
        assert used[1] == used[2]
        alice.post(f"{box}/resume").raise_for_status()
        assert list(heard)[-1][1]["result"]["stdout"] == "".join(f"{n}\n" for n in range(41))


def test_what_a_state_does_not_allow_is_refused(alice: httpx.Client, box: str) -> None:
    problem(alice.post(f"{box}/resume"), 409, "invalid_transition")
    alice.post(f"{box}/pause").raise_for_status()
    problem(alice.post(f"{box}/pause"), 409, "invalid_transition")
    alice.delete(box).raise_for_status()
    problem(alice.post(f"{box}/resume"), 410, "sandbox_gone")


def test_one_that_ends_by_many_hands_at_once_ends_once(alice: httpx.Client) -> None:
    """H19: expiry, kill and an end of the lease race."""
    with alice.stream("GET", "/v1/events") as stream:
        heard = events(stream)
        assert next(heard) == ("", {})
        box = make(alice, lease_s=0.3)
        ends = [
            lambda: alice.delete(box),
            lambda: alice.patch(box, json={"lease_s": 0}),
            lambda: alice.post(f"{box}/pause"),
        ] * 4
        with ThreadPoolExecutor(12) as pool:
            statuses = {answer.status_code for answer in pool.map(lambda end: end(), ends)}
        assert statuses <= {200, 204, 409, 410}
        is_now(alice, box, "stopped")
        make(alice, lease_s=0.01)
        seen = [next(heard) for _ in range(2)]
        while seen[-1][1]["sandbox_id"] == box[14:]:
            seen.append(next(heard))
    assert [kind for kind, data in seen if data["sandbox_id"] == box[14:]].count("sandbox.stopped") == 1


def test_pages_of_sandboxes_hold_each_once(alice: httpx.Client) -> None:
    boxes = [make(alice)[14:] for _ in range(5)]
    seen: list[str] = []
    after: str | None = None
    while after is not None or not seen:
        page = alice.get("/v1/sandboxes", params={"limit": 2, **({"after": after} if after else {})}).json()
        seen += [s["id"] for s in page["sandboxes"]]
        after = page["next"]
        if after is None:
            break
    assert [s for s in seen if s in boxes] == boxes[::-1] and len(seen) == len(set(seen))
    for name in boxes:
        alice.delete(f"/v1/sandboxes/{name}").raise_for_status()
