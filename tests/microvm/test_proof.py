"""A tier counts as proven only while all that it was proven with is the same (H13). No VM needed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import proofs
import pytest

from fumehood.config import Config
from fumehood.errors import SetupFailed
from fumehood.runtime.microvm.assets import Assets
from fumehood.runtime.microvm.proof import FACTS, FILE, Proof, proven_kernel, save

pytestmark = pytest.mark.rootless


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return proofs.host(tmp_path)


def rewrite(config: Config, change: Callable[[dict[str, object]], object]) -> None:
    """As if another one had been written: of another host, say."""
    path = config.state_dir / FILE
    document = json.loads(path.read_text())
    change(document["tiers"]["firecracker"])
    path.write_text(json.dumps(document))


def test_what_was_proven_is_proven_for_whoever_asks_and_nobody_else_can_read_it(config: Config) -> None:
    stored = proofs.proved(config)
    assert Proof.load(config, "firecracker") == stored and stored.proven and not stored.lost
    assert (config.state_dir / FILE).stat().st_mode & 0o777 == 0o600
    assert not Proof.load(config, "qemu").proven


def test_what_was_never_tried_is_not_proven_and_not_lost(config: Config) -> None:
    found = Proof.load(config, "firecracker")
    assert not found.proven and not found.lost and "never tried" in found.reason


@pytest.mark.parametrize("fact", FACTS)
def test_each_fact_that_is_another_now_takes_the_proof_back_and_is_named(config: Config, fact: str) -> None:
    proofs.proved(config)
    rewrite(config, lambda entry: entry["facts"].update({fact: "another"}))
    found = Proof.load(config, "firecracker")
    assert not found.proven and found.lost
    assert found.reason == f"{FACTS[fact]} changed since it was proven"


CHANGES: dict[str, Callable[[Config], object]] = {
    "another monitor": lambda config: Path(config.firecracker).write_text("#!/bin/sh\nexit 2\n"),
    "a monitor that is gone": lambda config: Path(config.firecracker).unlink(),
    "a monitor that is no program": lambda config: Path(config.firecracker).chmod(0o644),
    "another jailer": lambda config: Path(config.firecracker).with_name("jailer").write_text("another"),
    "a jailer that is gone": lambda config: Path(config.firecracker).with_name("jailer").unlink(),
    "another kernel": lambda config: proofs.publish(config, "kernels", "pvm", b"another"),
    "a kernel that is gone": lambda config: Assets(config.state_dir).remove("kernels", "pvm"),
    "a damaged kernel": lambda config: Assets(config.state_dir).load("kernels", "pvm").path("file").write_bytes(b"x"),
    "another image": lambda config: proofs.publish(config, "images", "python", b"another"),
    "an image that is gone": lambda config: Assets(config.state_dir).remove("images", "python"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_really_changes_on_the_host_takes_the_proof_back(config: Config, change: Callable[[Config], object]) -> None:
    proofs.proved(config)
    change(config)
    found = Proof.load(config, "firecracker")
    assert not found.proven and found.lost and found.reason


def test_what_has_nothing_to_do_with_it_does_not(config: Config) -> None:
    proofs.proved(config)
    proofs.publish(config, "kernels", "small", b"another")
    Path(config.qemu).write_text("another")
    assert Proof.load(config, "firecracker").proven


CORRUPT: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"format": 1, "tiers": {"firecr',
    "no JSON": b"\xff\xfe\x00",
    "a list": b"[]",
    "null": b"null",
    "another format": b'{"format": 2, "tiers": {}}',
    "no tiers": b'{"format": 1}',
    "tiers that are a list": b'{"format": 1, "tiers": ["firecracker"]}',
    "a tier that is nothing": b'{"format": 1, "tiers": {"firecracker": null}}',
    "a tier without fields": b'{"format": 1, "tiers": {"firecracker": {}}}',
    "nested beyond all measure": b"[" * 100_000,
    "endless": b" " * (2 << 20) + b"{}",
}


@pytest.mark.parametrize("data", CORRUPT.values(), ids=list(CORRUPT))
def test_a_corrupt_file_proves_nothing_warns_and_is_replaced_by_the_next_one(config: Config, data: bytes) -> None:
    (config.state_dir / FILE).write_bytes(data)
    found = Proof.load(config, "firecracker")
    assert not found.proven and found.lost and "can't be read" in found.reason
    assert proofs.proved(config).proven and Proof.load(config, "firecracker").proven


@pytest.mark.parametrize(
    "wrong",
    [
        {"reason": None},
        {"reason": 0},
        {"facts": {}},
        {"facts": []},
        {"at": "now"},
        {"tier": "qemu"},
        {"kernel": ["pvm"]},
        {"x": 1},
    ],
    ids=str,
)
def test_an_entry_of_the_wrong_shape_proves_nothing(config: Config, wrong: dict[str, object]) -> None:
    proofs.proved(config)
    rewrite(config, lambda entry: entry.update(wrong))
    assert not Proof.load(config, "firecracker").proven


def test_names_in_it_lead_to_no_file_outside(config: Config) -> None:  # H12
    proofs.proved(config)
    rewrite(config, lambda entry: entry.update(kernel="../images/python"))
    with pytest.raises(Exception, match="no asset"):
        Assets(config.state_dir).load("kernels", "../images/python")
    assert not Proof.load(config, "firecracker").proven


def test_a_directory_in_its_place_proves_nothing(config: Config) -> None:
    (config.state_dir / FILE).mkdir()
    assert not Proof.load(config, "firecracker").proven


def test_one_that_failed_says_why_and_that_it_was_proven_before(config: Config) -> None:
    before = proofs.proved(config)
    save(config, Proof("firecracker", reason="the guest hangs", at=before.at + 1))
    found = Proof.load(config, "firecracker")
    assert (found.proven, found.reason, found.lost, found.proven_at) == (False, "the guest hangs", True, before.at)


def test_one_that_never_worked_is_not_lost(config: Config) -> None:
    save(config, Proof("firecracker", reason="the guest hangs", at=1.0))
    assert not Proof.load(config, "firecracker").lost


def test_two_that_end_at_once_both_remain(config: Config) -> None:
    def often(tier: str) -> None:
        for _ in range(20):
            proofs.proved(config, tier)

    threads = [threading.Thread(target=often, args=(tier,)) for tier in ("firecracker", "qemu")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Proof.load(config, "firecracker").proven and Proof.load(config, "qemu").proven


def test_what_one_left_that_was_killed_while_writing_hinders_nobody(config: Config) -> None:
    part = (config.state_dir / FILE).with_name(".selftest.json.new")
    part.write_text("half of i")
    os.chmod(part, 0o444)
    assert proofs.proved(config).proven and not part.exists()


def test_only_the_kernel_that_was_proven_is_handed_out(config: Config) -> None:
    proof = proofs.proved(config)
    assert proven_kernel(config, proof).name == "pvm"
    proofs.publish(config, "kernels", "pvm", b"another")
    with pytest.raises(SetupFailed, match="not the one that was proven"):
        proven_kernel(config, proof)
