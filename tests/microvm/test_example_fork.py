"""The example of README, as a reader runs it: on both templates, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proven
import pytest

pytestmark = [pytest.mark.microvm, pytest.mark.root]
EXAMPLE = Path(__file__).parents[2] / "docs/examples/fork_trained_state.py"
RUN_S = 300.0


@pytest.fixture(scope="module")
def qemu_env(image: Callable[[str], Any], cached: Any) -> dict[str, str]:
    image("python"), image("data-analysis")
    return proven.environment(cached.directory("images", "python").parents[2])


@pytest.mark.parametrize("template", ["python", "data-analysis"])
def test_eight_forks_go_on_from_one_trained_state_and_differ(qemu_env: dict[str, str], template: str) -> None:
    command = [sys.executable, str(EXAMPLE), "--tier", "qemu", "--template", template]
    done = subprocess.run(command, env={**os.environ, **qemu_env}, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *([0-9.]+) +([0-9.]+) +([0-9.]+)(?:  <- best)?$", done.stdout, re.M)
    assert len(rows) == 8 and done.stdout.count("<- best") == 1
    assert len({loss for _, loss, _ in rows}) > 4, "each fork trained with a rate of its own"
    first = re.search(r"went from ([0-9.]+) to ([0-9.]+)$", done.stdout, re.M)
    last = re.search(r"rolled back to the snapshot: ([0-9.]+)$", done.stdout, re.M)
    assert first and last and float(first[2]) < float(first[1]) and last[1] == first[2]
