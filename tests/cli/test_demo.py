import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.data
def test_the_demo_analyses_real_data_and_contains_three_hostile_programs(fumehood: Run, tmp_path: Path) -> None:
    done = fumehood("demo", "--json", timeout=120)
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert found["analysis"]["stdout"] == "1461 days, wettest month 11, driest 7\n"
    assert (tmp_path / "out" / "weather.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "monthly.csv").read_text().startswith("month,rain_mm,wet_days,high\n")
    assert [h["contained"] for h in found["hostile"]] == [True, True, True]
    statuses = [h["result"]["status"] for h in found["hostile"]]
    assert statuses[0] == "pids_limit" and statuses[2] == "oom", statuses


@pytest.mark.data
def test_people_see_the_table_the_files_and_each_hostile_program(fumehood: Run) -> None:
    text = fumehood("demo", timeout=120).stdout
    assert "NOT CONTAINED" not in text and "\u2026" not in text
    assert "1.1.1.1:443" in text and "ended for memory" in text
    for word in ("wet_days", "weather.png", "fork bomb", "pids_limit", "oom"):
        assert word in text


def test_a_tier_in_which_the_attempts_mean_nothing_is_refused(fumehood: Run) -> None:
    for verb in (("demo",), ("demo", "escape")):
        done = fumehood(*verb, "--tier", "firecracker")
        assert done.returncode == 2 and "error: the demo does not mean anything" in done.stderr
