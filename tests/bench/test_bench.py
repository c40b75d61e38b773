"""The figures in docs/benchmarks.md are what they say: their arithmetic, the peers' bundle, a real run's data."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import bundle, figures, machine, page, subjects, sustained, targets

ROOT = Path(__file__).parents[2]
times = st.lists(st.floats(0, 1e6), min_size=1, max_size=300)


def test_a_percentile_is_the_nearest_rank() -> None:
    assert [figures.percentile(range(1, 101), p) for p in (1, 50, 95, 99, 100)] == [1, 50, 95, 99, 100]
    assert [figures.percentile([15, 20, 35, 40, 50], p) for p in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert figures.percentile([7.0], 99) == 7.0
    assert figures.percentile(range(20), 95) == 18  # 0.95 * 20 must not round up to rank 20


@given(times, st.floats(0.1, 100))
def test_at_least_p_percent_are_at_or_below_a_percentile_and_it_was_measured(samples: list[float], p: float) -> None:
    found = figures.percentile(samples, p)
    assert found in samples
    assert sum(s <= found for s in samples) * 100 >= p * len(samples) * (1 - 1e-12)
    assert sum(s < found for s in samples) * 100 < p * len(samples) * (1 + 1e-12)


@given(times)
def test_the_median_agrees_with_the_standard_library(samples: list[float]) -> None:
    assert figures.percentile(samples, 50) == statistics.median_low(samples)


@pytest.mark.parametrize(("samples", "p"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_a_percentile_of_nothing_is_an_error_and_never_a_zero(samples: list[float], p: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        figures.percentile(samples, p)


def test_failures_count_as_attempts_but_never_as_times() -> None:
    row = figures.summary([1.0, 2.0, 3.0], ["broke"])
    assert (row["attempts"], row["ok"], row["failures"], row["p50_ms"], row["p99_ms"]) == (4, 3, ["broke"], 2.0, 3.0)
    assert not {"p50_ms", "samples_ms"} & figures.summary([], ["broke"]).keys()


def test_a_missed_target_says_by_how_much_in_either_direction() -> None:
    assert figures.against(25, 10) == {"value": 25, "limit": 10, "at_least": False, "met": False, "miss": 2.5}
    assert figures.against(50, 100, at_least=True)["miss"] == 2.0
    assert figures.against(10, 10)["met"] and figures.against(100, 100, at_least=True)["met"]
    assert figures.against(1, 0)["miss"] is None and not figures.against(1, 0)["met"]
    assert figures.against(0, 100, at_least=True) == {"value": 0, "limit": 100, "at_least": True, "met": False, "miss": None}
    with pytest.raises(ValueError, match="no ratio"):
        figures.ratio(1, 0)


def test_every_target_is_reported_even_when_nothing_was_measured() -> None:
    found = targets.verdicts({"rows": []})
    assert len(found) == len(targets.TARGETS)
    assert all(v["value"] is None and v["met"] is None for v in found)


def test_a_leak_of_one_is_a_leak_and_the_allocators_slack_is_none() -> None:
    before = {"descriptors": 12, "cgroups": 6, "free_uids": 1023, "rss_mib": 40.0}
    assert sustained.leaks(before, before | {"rss_mib": 44.0}) == []
    assert sustained.leaks(before, before | {"descriptors": 13}) == ["descriptors: 12 -> 13"]
    assert sustained.leaks(before, before | {"free_uids": 1022}) == ["free_uids: 1023 -> 1022"]
    assert sustained.leaks(before, before | {"rss_mib": 60.0}) == ["rss_mib: 40.0 -> 60.0"]


def test_a_busy_machine_is_found_out() -> None:
    assert machine.too_busy(load_1m=1.5, busy=0.0, cpus=2) == "the load average is 1.50 on 2 processors"
    assert machine.too_busy(load_1m=0.1, busy=0.5, cpus=2) == "other work uses 50% of the processors"
    assert machine.too_busy(load_1m=0.9, busy=0.05, cpus=2) == ""


@pytest.mark.root
@pytest.mark.may_skip("the host has no crun")
@pytest.mark.skipif(shutil.which("crun") is None, reason="the host has no crun")
def test_the_bundle_runs_isolated_under_crun(tmp_path: Path) -> None:
    """The peer is really contained: else its figures would flatter it, or ours."""
    code = (
        "import os, json; print(json.dumps({'pid': os.getpid(), 'top': sorted(os.listdir('/')),"
        "'links': [os.readlink('/proc/self/ns/' + n) for n in ('mnt', 'net', 'ipc', 'uts', 'pid', 'user')],"
        "'writable': os.access('/usr', os.W_OK)}))"
    )
    where = bundle.write(tmp_path, [sys.executable, "-c", code])
    command = [*subjects.crun(), "run", f"test-{os.getpid()}"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    inside = json.loads(done.stdout)
    assert inside["pid"] == 1 and not inside["writable"]
    assert not {"home", "etc", "var"} & set(inside["top"])
    ours = [os.readlink(f"/proc/self/ns/{n}") for n in ("mnt", "net", "ipc", "uts", "pid", "user")]
    assert not set(ours) & set(inside["links"])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench", "--quick", "--only", "zygote", "--force", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(next(out.glob("*.json")).read_text())


@pytest.mark.data
def test_a_quick_run_writes_valid_data_with_its_success_counts(quick: dict[str, Any]) -> None:
    assert {r["snippet"] for r in quick["rows"]} == {"print", "pandas"}, quick["absent"]
    for row in quick["rows"]:
        assert (row["ok"], row["attempts"], row["failures"]) == (20, 20, [])
        assert len(row["samples_ms"]) == row["ok"]
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] == max(row["samples_ms"])
        assert set(row["parts"]) == {"create", "run", "destroy"}
    assert {"kernel", "cpus", "load_1m", "python", "busy_share"} <= quick["machine"].keys()


@pytest.mark.data
def test_the_page_says_what_the_data_says_and_which_targets_were_not_measured(quick: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "run.json"
    page.write(
        {**quick, "contended": "the load average is 9 on 2 processors", "load_1m_at_end": 9.0}, data, tmp_path / "page.md"
    )
    text = (tmp_path / "page.md").read_text()
    assert quick["rows"], quick["absent"]
    for row in quick["rows"]:
        assert f"| 20/20 | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['p99_ms']:.1f} |" in text
    assert "**Taken on a busy machine" in text
    assert text.count("| not measured |") == sum(v["value"] is None for v in quick["targets"]) == len(targets.TARGETS) - 2
    assert "<svg" in (tmp_path / "run.svg").read_text()
