"""A tier is proven by a guest that ran, and by nothing else; one that can't run is not, and its last words are kept (M10)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fumehood.config import Config
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from fumehood.runtime.microvm.places import Places
from fumehood.runtime.microvm.proof import FILE, Proof
from fumehood.runtime.microvm.selftest import Attempt, failure_of, monitor, prove
from fumehood.runtime.tiers import TIERS, choose
from fumehood.supervisor import Supervisor

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Find = Callable[[str], Manifest]


@pytest.fixture
def config(cached: Assets, image: Find, firecracker: Path) -> Iterator[Config]:
    """A state directory of this test's own, on the file system of the assets, so that they are linked and not copied."""
    image("python")
    with tempfile.TemporaryDirectory(prefix="st-", dir=firecracker.parent) as name:
        state, run = Path(name, "s"), Path(name, "r")
        state.mkdir(mode=0o700)
        run.mkdir(mode=0o700)
        config = Config(state, run, firecracker=str(firecracker), microvm_boot_timeout_s=900.0)
        take(config, cached.load("images", "python"))
        yield config
        left = [p for p in (state / "microvm/machines").iterdir()] if (state / "microvm/machines").exists() else []
        assert not left, "what was tried is taken down again"


def take(config: Config, asset: Manifest, name: str = "", **changed: Any) -> Manifest:
    """The same asset there; `changed`: facts that are another's."""

    def make(directory: Path) -> Facts:
        for file in asset.files:
            os.link(asset.path(file), directory / file)
        return {**asset.facts, **changed}

    return Assets(config.state_dir).publish(asset.kind, name or asset.name, make, known=(asset,))


def zeros(config: Config, like: Manifest) -> Manifest:
    def make(directory: Path) -> Facts:
        for file in like.files:
            (directory / file).write_bytes(bytes(1 << 20))
        return like.facts

    return Assets(config.state_dir).publish("kernels", like.name, make)


async def test_qemu_is_proven_by_a_guest_and_its_runtime_can_then_be_had(config: Config, kernel: Find) -> None:
    take(config, kernel("stock"))
    steps: list[str] = []
    proof = await prove(config, "qemu", lambda text, done, total: steps.append(text))
    assert proof.proven, proof.reason
    assert (proof.kernel, proof.accel, proof.image) == ("stock", "tcg", "python") and "7." in proof.version
    assert steps == ["booting a guest: the kernel stock with tcg"] and proof.seconds > 0
    assert Proof.load(config, "qemu") == proof and (config.state_dir / FILE).stat().st_mode & 0o777 == 0o600
    supervisor = Supervisor(config, TIERS)
    assert supervisor.runtime("qemu").capabilities().available and choose(config).tier == "native"
    await supervisor.aclose()


async def test_firecracker_is_proven_with_the_first_kernel_that_comes_up_here(config: Config, kernel: Find) -> None:
    """`pvm` comes last, and only where the one with all protections on does not run."""
    for name in ("small", "pvm"):
        take(config, kernel(name))
    steps: list[str] = []
    proof = await prove(config, "firecracker", lambda text, done, total: steps.append(text))
    assert proof.proven, proof.reason
    assert steps[0] == "booting a guest: the kernel small with kvm" and proof.accel == "kvm"
    assert proof.kernel == "pvm" if len(steps) == 2 else proof.kernel == "small"
    assert choose(config).tier == "firecracker" and not choose(config).weaker
    (config.state_dir / "microvm/kernels" / proof.kernel / "vmlinux").write_bytes(b"another")
    assert choose(config).tier == "native" and choose(config).weaker


@pytest.mark.parametrize(("tier", "name"), [("qemu", "stock"), ("firecracker", "small")])
async def test_a_file_that_is_no_kernel_is_not_proven_and_the_reason_is_kept(
    config: Config, kernel: Find, tier: str, name: str
) -> None:
    zeros(config, kernel(name))
    proof = await prove(config, tier, kernels=[name])
    assert not proof.proven and f"the kernel {name} with" in proof.reason and len(proof.reason) > 60
    assert Proof.load(config, tier).reason == proof.reason and not Proof.load(config, tier).lost


async def test_a_guest_that_panics_is_not_proven_and_its_panic_is_kept(config: Config, kernel: Find) -> None:
    small = kernel("small")
    args = str(small.facts["boot_args"]).replace("init=/sbin/init", "init=/no/such/init")
    assert await tried(config, take(config, small, boot_args=args), 60.0, "Kernel panic - not syncing")


async def test_a_guest_that_hangs_is_given_up_and_its_last_words_are_kept(config: Config, kernel: Find) -> None:
    small = kernel("small")
    args = str(small.facts["boot_args"]).replace("panic=1", "panic=0").replace("init=/sbin/init", "init=/no/such/init")
    failure = await tried(config, take(config, small, boot_args=args), 15.0, "Kernel panic - not syncing")
    assert "did not answer within 15 s" in failure


async def tried(config: Config, kernel: Manifest, deadline_s: float, words: str) -> str:
    places = Places(config)
    try:
        image = Assets(config.state_dir).load("images", "python")
        failure = await failure_of(places, monitor(config, "qemu"), Attempt(kernel, "tcg", deadline_s), image)
    finally:
        places.aclose()
    assert words in failure, failure
    return failure


@pytest.mark.parametrize("tier", ["qemu", "firecracker"])
@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "#!/no/such/interpreter\n", "\x7fELF and no more"])
async def test_a_broken_monitor_is_not_proven(config: Config, tmp_path: Path, tier: str, text: str) -> None:
    broken = tmp_path / "monitor"
    broken.write_text(text)
    broken.chmod(0o755)
    proof = await prove(replace(config, **{tier: str(broken)}), tier)
    assert not proof.proven and ("can't be used" in proof.reason or "too old, or none" in proof.reason), proof.reason


async def test_without_any_kernel_or_image_it_says_how_to_make_them(config: Config) -> None:
    proof = await prove(config, "qemu")
    assert not proof.proven and "has not been made here" in proof.reason
    proof = await prove(config, "qemu", image="data-analysis")
    assert not proof.proven and "'data-analysis'" in proof.reason


async def test_an_image_with_another_agent_proves_nothing(config: Config, cached: Assets, kernel: Find) -> None:
    take(config, kernel("stock"))
    take(config, cached.load("images", "python"), agent="another")
    proof = await prove(config, "qemu")
    assert not proof.proven and "another version" in proof.reason and "image build python" in proof.reason


def cli(config: Config, *words: str) -> subprocess.CompletedProcess[str]:
    settings = {"STATE_DIR": config.state_dir, "RUN_DIR": config.run_dir, "FIRECRACKER": config.firecracker}
    environ = {**os.environ, **{f"FUMEHOOD_{name}": str(value) for name, value in settings.items()}}
    command = [sys.executable, "-c", "from fumehood.cli import main; main()", *words]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=False)


def test_one_command_sets_qemu_up_and_what_it_says_to_run_next_runs(config: Config, kernel: Find) -> None:
    take(config, kernel("stock"))
    done = cli(config, "image", "prepare", "qemu", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert (made["tier"], made["kernel"], made["accel"], made["policy"]) == ("qemu", "stock", "tcg", "default")
    assert made["next"] == "fumehood run --tier qemu --policy default -c 'print(6 * 7)'"
    ran = cli(config, "run", "--local", "--json", "--tier", "qemu", "--policy", "default", "-c", "print(6 * 7)")
    result = json.loads(ran.stdout)
    assert (ran.returncode, result["stdout"], result["tier"]) == (0, "42\n", "qemu"), ran.stderr
    again = cli(config, "image", "prepare", "qemu")
    assert again.returncode == 0 and re.match(r"ready in \d+ s: qemu ", again.stdout) and again.stdout.count("\n") == 1


def test_doctor_boots_a_guest_when_told_to_and_shows_the_stored_proof_otherwise(config: Config, kernel: Find) -> None:
    take(config, kernel("stock"))
    booted = json.loads(cli(config, "doctor", "--boot", "--tier", "qemu", "--json").stdout)
    row = next(row for row in booted["tiers"] if row["tier"] == "qemu")
    assert booted["tier"] == "qemu" and booted["available"] and row["usable"], row
    stored = json.loads(cli(config, "doctor", "--json").stdout)
    assert next(row for row in stored["tiers"] if row["tier"] == "qemu") == row and stored["tier"] == "native"
