"""A sandbox that goes on from a snapshot is what the snapshot is; what is asked besides is refused before anything is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from opened import ADMIN, ME

from fumehood.config import Config
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.model import MIB, SandboxSpec
from fumehood.policy.resolve import resolve
from fumehood.records import SnapshotRecord
from fumehood.service import spec_json
from fumehood.service.asks import MAX_METADATA_CHARS, Asks, CreateAsk

SERVER = Asks(Config(Path("/nowhere"), Path("/nowhere"), tier="qemu"), lambda tier: frozenset({"cpus"}))
SPEC = resolve("default", overrides={"limits": {"memory_bytes": 128 * MIB}}, env={"A": "1", "B": "2"})


def kept(spec: SandboxSpec = SPEC) -> SnapshotRecord:
    words = (spec.template.name, spec.policy_name, spec.policy_hash, spec_json.to_text(spec))
    return SnapshotRecord("p" + "0" * 16, "one", "key1", "s" + "0" * 16, "qemu", *words, "ready", 5.0, 7)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"tier": "auto"},
        {"tier": "qemu", "template": "python", "policy": "default"},
        {"limits": {"memory_bytes": 128 * MIB}},
        {"limits": {"memory_bytes": "128 MiB"}},
        {"metadata": {"a": "b"}, "lease_s": 5.0, "on_expiry": "pause"},
    ],
    ids=str,
)
def test_what_is_left_out_or_equal_is_the_snapshots(asked: dict[str, Any]) -> None:
    spec, kind = SERVER.restored(ME, CreateAsk(**asked), kept())
    assert spec == SPEC and (kind.tier, kind.snapshot) == ("qemu", kept().id)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"tier": "native"}, "tier"),
        ({"tier": "nothing"}, "tier"),
        ({"template": "data-analysis"}, "template"),
        ({"policy": "strict"}, "policy"),
        ({"policy": {"limits": {"pids": 64}}}, "policy"),
        ({"limits": {"memory_bytes": 64 * MIB}}, "memory_bytes"),
        ({"limits": {"pids": 64}}, "pids"),
        ({"limits": {"memry": 1}}, "memry"),
        ({"limits": {"pids": "\0"}}, "pids"),
    ],
    ids=str,
)
def test_what_a_snapshot_can_not_become_is_refused_by_its_name(asked: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        SERVER.restored(ME, CreateAsk(**asked), kept())


def test_its_environment_is_the_snapshots_with_the_callers_laid_over() -> None:
    spec, kind = SERVER.restored(ME, CreateAsk(env={"B": "3", "C": "4"}), kept())
    assert spec.env == {"A": "1", "B": "3", "C": "4"} and replace(spec, env=SPEC.env) == SPEC
    assert kind.spec.env == SPEC.env


def test_it_stands_for_no_warm_one_and_none_for_it() -> None:
    _, kind = SERVER.restored(ME, CreateAsk(), kept())
    _, plain = SERVER.resolve(ME, CreateAsk(policy="default"))
    assert kind != plain and kind != replace(kind, snapshot="p" + "1" * 16)


def test_what_an_admin_made_large_is_not_for_others_of_its_tenant() -> None:
    large = kept(resolve("default", overrides={"limits": {"pids": 5_000}}))
    SERVER.restored(ADMIN, CreateAsk(), large)
    with pytest.raises(InvalidInput, match="pids"):
        SERVER.restored(ME, CreateAsk(), large)


@pytest.mark.parametrize("asked", [{"env": {"A=B": "1"}}, {"env": {"A": "\0"}}, {"metadata": {"a": "b" * MAX_METADATA_CHARS}}])
def test_labels_and_environment_are_checked_as_ever(asked: dict[str, Any]) -> None:
    with pytest.raises(FumehoodError):
        SERVER.restored(ME, CreateAsk(**asked), kept())
