"""docs/config.md is what the code says, and says all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from fumehood.config import Config

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_program_writes_from_the_code() -> None:
    command = [sys.executable, str(ROOT / "tools/config-reference"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_setting_stands_there_once_with_its_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \| (.+) \|$", (ROOT / "docs/config.md").read_text(), re.MULTILINE)
    assert [name for name, *_ in rows] == [f.name for f in fields(Config)]
    assert all(meaning for *_, meaning in rows)


def test_a_page_that_is_out_of_date_is_found_out(tmp_path: Path) -> None:
    """The check above can fail: the same program beside an old page."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools/config-reference").write_bytes((ROOT / "tools/config-reference").read_bytes())
    (tmp_path / "docs/config.md").write_text((ROOT / "docs/config.md").read_text().replace("`8388608`", "`1048576`"))
    command = [sys.executable, str(tmp_path / "tools/config-reference"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "run tools/config-reference" in done.stderr
