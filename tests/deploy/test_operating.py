"""docs/operating.md names settings, verbs, files and error codes that exist, and leaves out no code."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fumehood import errors
from fumehood.config import Config
from fumehood.model import Limits

pytestmark = pytest.mark.rootless
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/operating.md").read_text()


def test_every_error_code_has_a_line_of_advice_and_no_other_word_does() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FumehoodError)]
    table = TEXT.partition("## Troubleshooting")[2]
    named = {code for row in re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE) for code in re.findall(r"`(\w+)`", row)}
    assert named == {c.code for c in classes}


def test_the_settings_that_it_names_exist() -> None:
    known = {f.name for f in fields(Config)} | {f.name for f in fields(Limits)}
    named = set(
        re.findall(r"`([a-z]+(?:_[a-z]+)*_(?:s|bytes|limit|running|overcommit|sandboxes|rows|dir|key|supervisor))`", TEXT)
    )
    assert named and named <= known, named - known
    variables = {name.lower() for name in re.findall(r"FUMEHOOD_([A-Z_]+)", TEXT)}
    assert variables <= {f.name for f in fields(Config)}


def test_the_verbs_that_it_names_exist() -> None:
    for verb in sorted(set(re.findall(r"fumehood (serve|doctor|keys|ps|logs)\b", TEXT))):
        command = [str(Path(sys.executable).with_name("fumehood")), verb, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, (verb, done.stderr)


def test_the_files_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links and all((ROOT / "docs" / link).exists() for link in links)
    assert all((ROOT / path).exists() for path in re.findall(r"`?(deploy/[\w.]+)", TEXT))


def test_its_arithmetic_is_right() -> None:
    limits_gib = 24 * 0.85 * Config(Path("/"), Path("/")).memory_overcommit
    mib = limits_gib * 1024
    assert f"= {limits_gib:.0f} GiB" in TEXT
    assert f"{int(mib // 512)} sandboxes of the default 512 MiB, or {int(mib // 256)} of 256 MiB" in TEXT
    assert Limits().memory_bytes == 512 << 20
    assert f"{int(mib // 512)} × 7.9 MiB = {int(mib // 512) * 7.9 / 1024:.1f} GiB" in TEXT
