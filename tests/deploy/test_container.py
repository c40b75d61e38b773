"""deploy/Containerfile agrees with the program, the unit and Config. Building it needs an engine and a registry: not here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fumehood.config import Config, _directories

pytestmark = pytest.mark.rootless
ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "deploy/Containerfile").read_text()


def instruction(name: str) -> str:
    """Its argument, continuation lines joined. Each name that is asked for here stands there once."""
    found = re.findall(rf"^{name} (.+)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    assert len(found) == 1, found
    return found[0]


def test_it_starts_a_verb_that_exists() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["fumehood"]
    command = [str(Path(sys.executable).with_name("fumehood")), *json.loads(instruction("CMD")), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_its_volumes_are_the_programs_directories_closed_to_others() -> None:
    wanted = {str(path) for path in _directories({}, 0).values()}
    assert set(instruction("VOLUME").split()) == wanted
    assert set(re.findall(r"install -d -m 0700 (/\S+) (/\S+)", TEXT)[0]) == wanted  # a new volume takes the mode over


def test_its_settings_are_settings(tmp_path: Path) -> None:
    words = dict(word.split("=", 1) for word in instruction("ENV").split() if word.startswith("FUMEHOOD_"))
    directories = {"FUMEHOOD_STATE_DIR": str(tmp_path / "s"), "FUMEHOOD_RUN_DIR": str(tmp_path / "r")}
    config = Config.load({"HOME": str(tmp_path), **directories, **words})
    assert config.listen.rpartition(":")[2] == instruction("EXPOSE")


def test_what_it_copies_exists_and_reaches_the_build() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_it_asks_for_the_units_capabilities_and_never_for_all_privileges() -> None:
    unit = (ROOT / "deploy/fumehood.service").read_text()
    of_unit = re.findall(r"^CapabilityBoundingSet=(.+)$", unit, re.MULTILINE)[0].replace("CAP_", "").split()
    assert sorted(re.findall(r"--cap-add (\w+)", TEXT)) == sorted(of_unit)
    assert not re.search(r"^#   .*--privileged", TEXT, re.MULTILINE)


def test_it_names_no_registry() -> None:
    assert re.fullmatch(r"[a-z]+:[a-z-]+", instruction("FROM"))
