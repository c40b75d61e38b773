"""Routes of snapshots, forks and rollbacks where the tier has none: typed answers, and nothing is changed by asking."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from callers import SSE, problem, run

ID = "p" + "0" * 16
ASKS: dict[str, dict[str, Any]] = {
    "snapshots": {},
    "fork": {"count": 2, "lease_s": 5, "metadata": {"a": "b"}},
    "rollback": {"snapshot": ID},
}
WRONG: dict[str, tuple[str, Any]] = {
    "no fork": ("fork", {"count": 0}),
    "too many forks": ("fork", {"count": 65}),
    "forks as text": ("fork", {"count": "2"}),
    "no lease": ("fork", {"lease_s": 0}),
    "labels of numbers": ("fork", {"metadata": {"a": 1}}),
    "unknown member of a fork": ("fork", {"counts": 1}),
    "unknown member of a snapshot": ("snapshots", {"name": "a"}),
    "no object": ("snapshots", []),
    "a label too long": ("snapshots", {"metadata": {"a": "x" * 4_097}}),
    "back to nothing": ("rollback", {}),
    "back to nothing in words": ("rollback", {"checkpoint": None, "snapshot": None}),
    "back to two": ("rollback", {"checkpoint": "python:check1", "snapshot": ID}),
    "back to a number": ("rollback", {"snapshot": 1}),
    "back to a long name": ("rollback", {"snapshot": "p" * 65}),
}


@pytest.mark.parametrize("what", ASKS)
def test_it_is_not_of_this_tier_and_the_answer_names_those_that_can(alice: httpx.Client, box: str, what: str) -> None:
    run(alice, box, "x = 41")
    said = problem(alice.post(f"{box}/{what}", json=ASKS[what]), 501, "unsupported")
    assert "native" in said["cause"] and "firecracker or qemu" in said["remediation"] and not said["retryable"]
    assert run(alice, box, "x + 1")["results"][0]["data"]["text/plain"] == "42"
    assert len(alice.get("/v1/sandboxes").json()["sandboxes"]) == 1
    assert alice.get("/v1/snapshots").json() == {"snapshots": [], "next": None}


@pytest.mark.parametrize("what", ASKS)
def test_a_refusal_leaves_its_idempotency_key_free(alice: httpx.Client, box: str, what: str) -> None:
    for _ in range(2):
        answer = alice.post(f"{box}/{what}", json=ASKS[what], headers={"idempotency-key": what})
        problem(answer, 501, "unsupported")
        assert "idempotent-replayed" not in answer.headers


def test_a_rollback_to_a_checkpoint_is_done_once_for_each_key(alice: httpx.Client, box: str) -> None:
    run(alice, box, "x = 1")
    kept = alice.post(f"{box}/checkpoints", json={}).raise_for_status().json()["checkpoint"]
    first = alice.post(f"{box}/rollback", json={"checkpoint": kept}, headers={"idempotency-key": "back"})
    run(alice, box, "x = 2")
    second = alice.post(f"{box}/rollback", json={"checkpoint": kept}, headers={"idempotency-key": "back"})
    for answer in (first, second):
        assert (answer.status_code, answer.content, answer.headers.get("content-type")) == (204, b"", None)
    assert second.headers["idempotent-replayed"] == "true"
    assert run(alice, box, "x")["results"][0]["data"]["text/plain"] == "2"


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_anything_else(alice: httpx.Client, box: str, what: str) -> None:
    end, body = WRONG[what]
    problem(alice.post(f"{box}/{end}", json=body), 422, "invalid_input")


def test_a_snapshot_that_nobody_has_is_not_found_by_any_route(alice: httpx.Client) -> None:
    for answer in (
        alice.get(f"/v1/snapshots/{ID}"),
        alice.delete(f"/v1/snapshots/{ID}"),
        alice.post("/v1/sandboxes", json={"snapshot": ID}),
    ):
        assert ID in problem(answer, 404, "not_found")["message"]
    problem(alice.post("/v1/sandboxes", json={"snapshot": "x" * 65}), 422, "invalid_input")
    assert alice.get("/v1/sandboxes").json()["sandboxes"] == []


def test_a_paused_one_is_asked_without_being_woken(alice: httpx.Client) -> None:
    box = f"/v1/sandboxes/{alice.post('/v1/sandboxes', json={'auto_resume': True}).raise_for_status().json()['id']}"
    alice.post(f"{box}/pause").raise_for_status()
    for what, body in ASKS.items():
        problem(alice.post(f"{box}/{what}", json=body, headers=SSE), 501, "unsupported")
    assert alice.get(box).json()["state"] == "paused"
    alice.delete(box).raise_for_status()
