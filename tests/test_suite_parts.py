"""`make test`: a part that fails is never lost, and nothing lives on. The parts are stand-ins here, tools/suite is real."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "tools/suite"
# FAILS names the part that does, SLOW those that take a while.
STAND_IN = """#!/bin/bash
case "$0 $*" in
    *ahead.py*) part=machines ;;
    *v2_lane*) part=lane ;;
    *rootless*) part=user ;;
    *) part=root ;;
esac
echo "ran $part $*"
if [[ "$SLOW" = *$part* ]]; then echo $$ >$part.pid; sleep 20; fi
[ "$FAILS" != $part ]
"""
PARTS = ("root", "user", "machines", "lane")
pytestmark = pytest.mark.root


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (".venv/bin/python", "tools/rootless"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    shutil.copy(SUITE, tmp_path / "tools")
    return tmp_path


def suite(checkout: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    argv = [str(checkout / "tools/suite"), *arguments]
    return subprocess.Popen(
        argv, env=os.environ | {"MACHINES": ""} | variables, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=30)[0].splitlines()


@pytest.mark.parametrize("fails", [*PARTS, ""])
def test_every_part_runs_and_one_that_fails_fails_the_whole(fails: str, checkout: Path) -> None:
    process = suite(checkout, FAILS=fails)
    lines = said(process)
    assert [line.split()[1] for line in lines if line.startswith("ran ")] == list(PARTS)
    assert sum(": FAILED, " in line for line in lines) == process.returncode == (1 if fails else 0)


@pytest.mark.parametrize("fails", ["root", "user", ""])
def test_without_machines_it_is_two_parts(fails: str, checkout: Path) -> None:
    process = suite(checkout, FAILS=fails, MACHINES="no")
    lines = said(process)
    assert [line.split()[1] for line in lines if line.startswith("ran ")] == ["root", "user"]
    assert process.returncode == (1 if fails else 0)


@pytest.mark.parametrize("fails", ["root", ""])
def test_a_choice_of_tests_is_all_that_runs(fails: str, checkout: Path) -> None:
    process = suite(checkout, "-k", "some", FAILS=fails)
    assert said(process) == ["ran root -m pytest -o faulthandler_timeout=120 -k some"]
    assert process.returncode == (1 if fails else 0)


@pytest.mark.parametrize("slow", ["lane", "machines", "machines user"])
def test_what_runs_beside_ends_with_the_suite_h19(slow: str, checkout: Path) -> None:
    process = suite(checkout, SLOW=slow)
    pid = checkout / f"{slow.split()[0]}.pid"
    wait(lambda: pid.exists() and bool(pid.read_text()))
    beside = Path("/proc", pid.read_text().strip())
    os.killpg(process.pid, signal.SIGTERM)  # as timeout(1) and a terminal do
    process.communicate(timeout=30)
    assert process.returncode != 0
    wait(lambda: not beside.exists())


def wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
