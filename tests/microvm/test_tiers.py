"""What `auto` is: the strongest tier that is proven here, never one that is weaker without a word (M10, H13)."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import proofs
import pytest

from fumehood.config import Config
from fumehood.errors import ProtectionUnavailable
from fumehood.runtime.microvm.proof import FILE, Proof, save
from fumehood.runtime.tiers import MICROVM, TIERS, choose, microvm
from fumehood.supervisor import Supervisor

pytestmark = pytest.mark.rootless


def proven(config: Config) -> None:
    proofs.proved(config)


def proven_once(config: Config) -> None:
    proofs.proved(config)
    proofs.publish(config, "kernels", "pvm", b"another")


def failed(config: Config) -> None:
    save(config, Proof("firecracker", reason="the guest hangs", at=1.0))


def failed_after_success(config: Config) -> None:
    proofs.proved(config)
    failed(config)


def corrupt(config: Config) -> None:
    (config.state_dir / FILE).write_text("{")


TABLE: dict[str, tuple[Callable[[Config], object], str, bool]] = {  # what is stored, what auto is, whether it warns
    "nothing": (lambda config: None, "native", False),
    "firecracker": (proven, "firecracker", False),
    "qemu alone": (lambda config: proofs.proved(config, "qemu", "small"), "native", False),
    "both": (lambda config: (proofs.proved(config), proofs.proved(config, "qemu", "small")), "firecracker", False),
    "firecracker, which never worked": (failed, "native", False),
    "firecracker, with another kernel": (proven_once, "native", True),
    "firecracker, which stopped working": (failed_after_success, "native", True),
    "nonsense": (corrupt, "native", True),
}


@pytest.mark.parametrize(("stored", "tier", "warns"), TABLE.values(), ids=list(TABLE))
def test_auto_is_the_strongest_proven_and_warns_when_it_is_less_than_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stored: Callable[[Config], object], tier: str, warns: bool
) -> None:
    config = proofs.host(tmp_path)
    stored(config)
    found = choose(config)
    assert (found.tier, bool(found.weaker)) == (tier, warns) and "firecracker" in found.why + found.tier
    if tier == "native":
        assert microvm(config, "firecracker").reason in found.why
    with caplog.at_level(logging.WARNING):
        supervisor = Supervisor(config, TIERS)
        assert supervisor.choice == supervisor.choice == found
    said = [record.message for record in caplog.records]
    assert said == ([found.weaker] if warns else []) and (not warns or "fumehood image prepare firecracker" in said[0])


@pytest.mark.parametrize("tier", ["native", "qemu", "fake"])
def test_a_tier_that_the_settings_name_is_taken_whatever_is_proven_and_nothing_is_warned_of(tmp_path: Path, tier: str) -> None:
    config = proofs.host(tmp_path, tier=tier)
    proven_once(config)
    found = choose(config)
    assert (found.tier, found.weaker) == (tier, "") and "setting" in found.why


@pytest.mark.parametrize("tier", MICROVM)
def test_a_tier_by_name_that_is_not_proven_is_refused_with_what_to_run_and_never_replaced(tmp_path: Path, tier: str) -> None:
    config = proofs.host(tmp_path)
    for stored in (lambda: None, lambda: corrupt(config)):
        stored()
        with pytest.raises(ProtectionUnavailable) as refused:
            Supervisor(config, TIERS).runtime(tier)
        assert refused.value.remediation == f"run: fumehood image prepare {tier}" and refused.value.cause


def test_auto_that_the_settings_turn_into_an_unproven_tier_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ProtectionUnavailable, match="not proven"):
        Supervisor(proofs.host(tmp_path, tier="firecracker"), TIERS).runtime("auto")


def test_what_is_chosen_stays_chosen_as_long_as_the_supervisor_lives(tmp_path: Path) -> None:
    config = proofs.host(tmp_path)
    supervisor = Supervisor(config, TIERS)
    assert supervisor.choice.tier == "native"
    proofs.proved(config)
    assert supervisor.choice.tier == "native" and Supervisor(config, TIERS).choice.tier == "firecracker"


def test_where_nothing_was_set_up_nothing_of_microvms_is_loaded(tmp_path: Path) -> None:
    code = (
        "import json, sys, pathlib\n"
        "import fumehood; fumehood.Sandbox\n"
        "from fumehood.config import Config\n"
        "from fumehood.runtime.tiers import choose\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "tier = choose(Config(here, here)).tier\n"
        "print(json.dumps([tier, [m for m in sys.modules if m.startswith('fumehood.runtime.microvm')]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["native", []]


def test_a_standing_says_what_is_used_or_what_to_run(tmp_path: Path) -> None:
    config = proofs.host(tmp_path)
    proofs.proved(config)
    found = {tier: microvm(config, tier) for tier in MICROVM}
    assert found["firecracker"].usable and "1.12.1, kernel pvm (its own mitigations are off" in found["firecracker"].detail
    assert not found["qemu"].usable and found["qemu"].fix == "run: fumehood image prepare qemu"
