"""`fumehood image prepare`: what it says when something is missing. What it does is in tests/microvm."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fumehood.runtime.microvm import kvm

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUMEHOOD_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FUMEHOOD_RUN_DIR", str(tmp_path / "run"))


@pytest.fixture
def no_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def made(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "state").glob("microvm/*/*")]


@pytest.mark.parametrize("tier", ["native", "auto", "fake", "vmware"])
def test_a_tier_without_guests_is_wrong_usage(fumehood: Run, tier: str) -> None:
    done = fumehood("image", "prepare", tier)
    assert done.returncode == 2 and "known: firecracker, qemu" in done.stderr


@pytest.mark.parametrize(("tier", "help_"), [("qemu", "apt-get install"), ("firecracker", "firecracker-microvm")])
def test_without_a_monitor_it_says_how_to_get_one_and_makes_nothing(
    fumehood: Run, no_programs: None, tmp_path: Path, tier: str, help_: str
) -> None:
    done = fumehood("image", "prepare", tier, "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 126 and "on PATH" in error["cause"] and help_ in error["remediation"]
    assert not made(tmp_path)


@pytest.mark.parametrize("tier", ["qemu", "firecracker"])
def test_a_monitor_that_is_none_is_refused_before_anything_is_built(
    fumehood: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tier: str
) -> None:
    monitor = tmp_path / "monitor"
    monitor.write_text("#!/bin/sh\necho 'coffee machine 1.0'\n")
    monitor.chmod(0o755)
    monkeypatch.setenv(f"FUMEHOOD_{tier.upper()}", str(monitor))
    done = fumehood("image", "prepare", tier)
    assert done.returncode == 126 and "coffee machine" in done.stderr and not made(tmp_path)


def test_a_monitor_that_was_named_is_not_replaced_by_one_that_is_installed(
    fumehood: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FUMEHOOD_QEMU", str(tmp_path / "mine"))
    done = fumehood("image", "prepare", "qemu", "--install")
    assert done.returncode == 126 and "mine is no file" in done.stderr


@pytest.mark.root
@pytest.mark.parametrize(("jailer", "mode", "said"), [(False, 0o755, "has no jailer"), (True, 0o700, "chmod 755")])
def test_a_monitor_that_no_machine_could_run_is_told_before_anything_is_built(
    fumehood: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jailer: bool, mode: int, said: str
) -> None:
    if not os.path.exists(kvm.DEVICE):
        said = "no KVM for us"
    for name in ("Firecracker", "Jailer") if jailer else ("Firecracker",):
        program = tmp_path / name.lower()
        program.write_text(f"#!/bin/sh\necho '{name} v1.14.4'\n")
        program.chmod(mode)
    monkeypatch.setenv("FUMEHOOD_FIRECRACKER", str(tmp_path / "firecracker"))
    done = fumehood("image", "prepare", "firecracker")
    assert done.returncode == 126 and said in done.stderr and not made(tmp_path)


@pytest.mark.rootless
def test_installing_takes_root_and_apt(fumehood: Run, no_programs: None) -> None:
    assert os.geteuid() != 0 or not Path(os.environ["PATH"], "apt-get").exists()
    done = fumehood("image", "prepare", "qemu", "--install")
    assert done.returncode == 2 and "it takes root and apt-get" in done.stderr


def test_an_image_that_has_no_recipe_is_refused(fumehood: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho 'QEMU emulator version 9.0.0'\n")
    qemu.chmod(0o755)
    monkeypatch.setenv("FUMEHOOD_QEMU", str(qemu))
    done = fumehood("image", "prepare", "qemu", "--template", "cobol")
    assert done.returncode == 125 and "no recipe for an image 'cobol'" in done.stderr and not made(tmp_path)
