"""A minute of mixed load on a real server, then a burst and a crowd: nothing lost, mixed up or left. No times are asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECONDS, SESSIONS, REQUESTS = 60, 40, 500


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("load")
    parts = [word for part in ("mixed", "burst", "crowd") for word in ("--only", part)]
    sizes = ["--seconds", str(SECONDS), "--sessions", str(SESSIONS), "--requests", str(REQUESTS)]
    sizes += ["--pool-idle-s", "3"]  # a minute less of waiting for a pool that shrinks
    command = [sys.executable, "-m", "bench.load", "--force", "--out", str(out), *parts, *sizes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(out.glob("*.json")).read_text())


def test_no_request_of_a_minute_is_lost_or_answered_with_anothers_result(report: dict[str, Any]) -> None:
    mixed = report["mixed"]
    assert (mixed["lost"], mixed["wrong_owner"], mixed["stuck"]) == (0, 0, 0), mixed["examples"]
    assert mixed["requests"] == sum(mixed[fate] for fate in ("answered", "refused", "aborted", "unexpected"))
    assert mixed["generator"]["failures"] == []
    assert mixed["generator"]["started"] >= SECONDS * 50  # the load was there
    assert mixed["answered"] > mixed["requests"] * 0.5, mixed["by_kind"]  # and it was not all refused


def test_every_program_under_load_ends_as_it_should_hostile_ones_contained_h15(report: dict[str, Any]) -> None:
    mixed = report["mixed"]
    assert mixed["unexpected"] == 0, mixed["examples"]
    hostile = ("fork bomb", "memory hog", "disk fill", "flood", "spin", "mount")
    assert all(mixed["by_kind"][name].get("answered") for name in hostile), mixed["by_kind"]


def test_each_execution_has_exactly_one_record_also_when_its_caller_hung_up(report: dict[str, Any]) -> None:
    mixed = report["mixed"]
    assert mixed["records_wrong"] == 0, mixed["records_wrong_examples"]
    assert mixed["by_kind"]["hang up"]["aborted"] > 0
    assert mixed["by_kind"]["drop"]["aborted"] > 0


def test_nothing_is_left_after_the_load_h19(report: dict[str, Any]) -> None:
    assert report["mixed"]["leaks"] == []


def test_each_of_a_burst_gets_its_result_or_a_clean_429(report: dict[str, Any]) -> None:
    burst = report["burst"]
    assert (burst["lost"], burst["wrong_owner"], burst["unexpected"]) == (0, 0, 0), burst["examples"]
    assert burst["answered"] + burst["refused"] == REQUESTS
    assert burst["answered"] >= 100  # as many as the queue holds, at least
    assert burst["records_wrong"] == 0, burst["records_wrong_examples"]


def test_a_crowd_of_sessions_is_alive_together_each_with_its_own_state(report: dict[str, Any]) -> None:
    crowd = report["crowd"]
    assert (crowd["made"], crowd["alive"], crowd["own_state"]) == (SESSIONS, SESSIONS, SESSIONS), crowd["examples"]


def test_the_server_ends_in_order_and_said_nothing_of_failures(report: dict[str, Any]) -> None:
    assert report["server_mixed_burst_crowd"] == {"exit_code": 0, "broken": False}
