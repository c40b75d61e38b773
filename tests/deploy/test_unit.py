"""deploy/fumehood.service: it parses, means this program and these directories, and takes nothing that a sandbox needs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from fumehood.config import Config, _directories

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/fumehood.service"
FUMEHOOD = str(Path(sys.executable).with_name("fumehood"))


@pytest.fixture(scope="module")
def unit() -> dict[str, list[str]]:
    found = defaultdict[str, list[str]](list)
    for line in UNIT.read_text().splitlines():
        if match := re.match(r"([A-Za-z]+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


@pytest.mark.may_skip("the host has no systemd-analyze")
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="the host has no systemd-analyze")
def test_systemd_has_nothing_to_say_about_it(tmp_path: Path) -> None:
    copy = tmp_path / "fumehood.service"
    copy.write_text(UNIT.read_text().replace("/opt/fumehood/bin/fumehood", FUMEHOOD))  # it looks for the program
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.rootless
def test_the_verb_that_it_starts_exists(unit: dict[str, list[str]]) -> None:
    program, *arguments = shlex.split(unit["ExecStart"][0])
    assert Path(program).name == "fumehood"
    done = subprocess.run([FUMEHOOD, *arguments, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.rootless
def test_its_directories_are_the_programs_own(unit: dict[str, list[str]]) -> None:
    found = _directories({}, 0)  # what load() uses as root, without making it on this host
    assert found["state_dir"] == Path("/var/lib", unit["StateDirectory"][0])
    assert found["run_dir"] == Path("/run", unit["RuntimeDirectory"][0])
    assert unit["StateDirectoryMode"] == unit["RuntimeDirectoryMode"] == ["0700"]  # Config refuses what others may enter


@pytest.mark.rootless
def test_its_times_and_sizes_hold_the_defaults(unit: dict[str, list[str]], tmp_path: Path) -> None:
    config = Config(tmp_path, tmp_path)
    assert float(unit["TimeoutStopSec"][0]) > config.grace_s + 10
    assert int(unit["LimitNOFILE"][0]) > config.max_connections + 32 * (config.max_sandboxes + config.pool_ceiling)
    assert unit["KillMode"] == ["mixed"]  # else SIGTERM reaches the work that the drain waits for
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]  # else a restarted server can't find what a killed one left (H19)
    assert unit["OOMPolicy"] == ["continue"]  # else one sandbox over its limit ends all (H15)


@pytest.mark.rootless
def test_what_it_says_must_not_be_set_is_not_set(unit: dict[str, list[str]]) -> None:
    listed = UNIT.read_text().partition("NOT to be set")[2]
    names = {name for line in re.findall(r"^#   (\w+=.*)", listed, re.MULTILINE) for name in re.findall(r"(\w+)=", line)}
    assert len(names) > 12
    assert not names & set(unit)


@pytest.mark.root
@pytest.mark.may_skip("the host has no setpriv")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="the host has no setpriv")
def test_its_capabilities_are_enough_for_every_protection_and_one_less_is_not(
    unit: dict[str, list[str]], tmp_path: Path
) -> None:
    kept = [name.removeprefix("CAP_").lower() for name in unit["CapabilityBoundingSet"][0].split()]
    directories = {"FUMEHOOD_STATE_DIR": str(tmp_path / "state"), "FUMEHOOD_RUN_DIR": str(tmp_path / "run")}
    enough = _run(kept, directories)
    assert enough["status"] == "ok", enough
    assert {p["name"]: p["state"] for p in enough["protections"]} == {
        p["name"]: p["state"] for p in _run(None, directories)["protections"]
    }
    assert "status" not in _run([name for name in kept if name != "dac_override"], directories)


@pytest.mark.root
def test_a_callers_umask_shuts_no_sandbox_out_of_its_own_root(tmp_path: Path) -> None:
    directories = {"FUMEHOOD_STATE_DIR": str(tmp_path / "state"), "FUMEHOOD_RUN_DIR": str(tmp_path / "run")}
    assert _run(None, directories, umask=0o077)["status"] == "ok"


def _run(kept: list[str] | None, directories: dict[str, str], umask: int = -1) -> dict[str, Any]:
    bounding = f"--bounding-set=-all,+{',+'.join(kept or ())}"
    confine = [] if kept is None else ["setpriv", "--no-new-privs", "--inh-caps=-all", bounding]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": directories["FUMEHOOD_STATE_DIR"], **directories}
    command = [*confine, FUMEHOOD, "run", "--json", "-c", "print(1)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, umask=umask)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)
