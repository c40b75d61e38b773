import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fumehood.cli.doctor import unmet
from fumehood.model import Enforcement, Protection

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_every_protection_is_stated_with_a_fix_where_it_is_not_enforced(fumehood: Run) -> None:  # H13
    found = json.loads(fumehood("doctor", "--json").stdout)
    assert {"seccomp", "landlock", "no-new-privs"} <= {p["name"] for p in found["protections"]}
    for protection in found["protections"]:
        assert protection["state"] in ("enforced", "degraded", "off")
        assert protection["state"] == "enforced" or protection["fix"], protection


def test_the_exit_code_is_one_exactly_when_something_required_is_missing(fumehood: Run) -> None:
    done = fumehood("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["available"] and not found["lacking"] else 1)
    assert found["host"]["kernel"]


def test_a_required_protection_that_is_degraded_or_unknown_is_unmet() -> None:
    required = frozenset({"seccomp", "memory", "unheard-of"})
    found = (Protection("seccomp", Enforcement.ENFORCED), Protection("memory", Enforcement.DEGRADED))
    assert unmet(required, found) == ["memory", "unheard-of"]
    assert unmet(frozenset({"seccomp"}), found) == []


def test_the_table_for_people_names_the_same_protections(fumehood: Run) -> None:
    names = {p["name"] for p in json.loads(fumehood("doctor", "--json").stdout)["protections"]}
    text = fumehood("doctor").stdout
    assert all(name in text for name in names)


def test_no_text_is_cut_and_each_fix_is_shown_once(fumehood: Run) -> None:
    found = json.loads(fumehood("doctor", "--json").stdout)
    text = fumehood("doctor").stdout
    assert "\u2026" not in text
    for fix in {p["fix"] for p in found["protections"]} - {""}:
        assert " ".join(text.split()).count(" ".join(fix.split())) == 1, fix


@pytest.mark.parametrize("options", [["doctor"], ["doctor", "--json"]])
def test_a_reader_that_leaves_is_told_nothing_and_gets_no_traceback(command: list[str], options: list[str]) -> None:
    running = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    with running.stderr:
        assert (running.stderr.read(), running.wait(60)) == (b"", 141)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A state directory in which no microVM was ever set up, and no monitor to be found."""
    monkeypatch.setenv("FUMEHOOD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FUMEHOOD_QEMU", str(tmp_path / "no-qemu"))
    monkeypatch.setenv("FUMEHOOD_FIRECRACKER", str(tmp_path / "no-firecracker"))
    return tmp_path / "state/microvm/selftest.json"


def test_tiers_that_nobody_set_up_are_shown_with_what_to_run_and_change_nothing_else(fumehood: Run, bare: Path) -> None:  # M10
    done = fumehood("doctor", "--json")
    found = json.loads(done.stdout)
    tiers = {row["tier"]: row for row in found["tiers"]}
    assert set(tiers) == {"native", "firecracker", "qemu"}
    for tier in ("firecracker", "qemu"):
        assert not tiers[tier]["usable"] and "never tried" in tiers[tier]["reason"]
        assert tiers[tier]["fix"] == f"run: fumehood image prepare {tier}"
    assert (found["auto"]["tier"], found["auto"]["weaker"], found["tier"]) == ("native", "", "native")
    assert tiers["native"]["usable"] == found["available"] and found["ok"] == (done.returncode == 0)
    assert not bare.exists()


def test_people_see_the_tiers_and_what_auto_is(fumehood: Run, bare: Path) -> None:
    text = " ".join(fumehood("doctor").stdout.split())
    assert "auto is native: firecracker is not proven: it was never tried on this host" in text
    assert text.count("image prepare firecracker") == 1


def test_a_tier_by_name_that_is_not_proven_is_a_finding_and_exit_one(fumehood: Run, bare: Path) -> None:
    done = fumehood("doctor", "--json", "--tier", "firecracker")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and not found["available"] and not found["ok"] and "never tried" in found["reason"]


@pytest.mark.parametrize("tier", ["qemu", "firecracker"])
def test_a_boot_without_a_monitor_fails_and_is_remembered_with_the_reason(fumehood: Run, bare: Path, tier: str) -> None:
    done = fumehood("doctor", "--json", "--boot", "--tier", tier)
    row = next(row for row in json.loads(done.stdout)["tiers"] if row["tier"] == tier)
    assert done.returncode == 1 and f"no-{tier} is no file" in row["reason"] and row["at"]
    again = json.loads(fumehood("doctor", "--json").stdout)
    assert next(row["reason"] for row in again["tiers"] if row["tier"] == tier) == row["reason"]


def test_a_lost_proof_is_said_in_red_letters_and_in_json(fumehood: Run, bare: Path) -> None:
    fumehood("doctor")
    bare.parent.mkdir(exist_ok=True)
    bare.write_text("{")
    done = fumehood("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["auto"]["tier"] == "native" and "can't be read" in found["auto"]["weaker"]
    assert "auto is native now, not firecracker" in done.stderr
    assert "warning: auto is native now, not firecracker" in " ".join(fumehood("doctor").stdout.split())


def test_a_tier_that_boots_nothing_is_wrong_usage(fumehood: Run, bare: Path) -> None:
    done = fumehood("doctor", "--boot", "--tier", "native")
    assert done.returncode == 2 and "it boots no guest" in done.stderr


def test_a_run_says_on_which_tier_it_was_as_doctor_has_it(fumehood: Run, bare: Path) -> None:
    ran = json.loads(fumehood("run", "--local", "--json", "-c", "1").stdout)
    assert ran["tier"] == json.loads(fumehood("doctor", "--json").stdout)["auto"]["tier"]
