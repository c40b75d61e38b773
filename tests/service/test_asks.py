"""What a caller asks for is checked before anything is made, and no ask names a file of the server's host (H11, H12, H14)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opened import ADMIN, ME

from fumehood.config import Config
from fumehood.errors import Forbidden, FumehoodError, InvalidInput, PolicyError
from fumehood.model import GIB, MIB, FileRules, Limits, SandboxSpec, Template
from fumehood.policy.load import preset_names
from fumehood.policy.resolve import TEMPLATES
from fumehood.service.asks import CEILINGS, MAX_METADATA_CHARS, Asks, CreateAsk, kind_of

LATE = frozenset({"cpus", "memory_bytes", "pids"})
CONFIG = Config(Path("/nowhere"), Path("/nowhere"), tier="native")
SERVER = Asks(CONFIG, lambda tier: LATE)
_opened: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir"):
        _opened.append(f"{event} {arguments[0]!r}")


sys.addaudithook(_hook)
for _name in preset_names():
    SERVER.resolve(ADMIN, CreateAsk(policy=_name))  # these files are the package's own, and are read once


@contextmanager
def no_file_is_opened() -> Iterator[None]:
    global _watching
    _opened.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _opened


PATHS = (
    *("/etc/passwd", "../x", "./default", "default/", "x.toml", "default.toml", "default.yml", "/dev/zero", "~/x.yaml"),
    *("preset default.toml", "default\0", "DEFAULT", " default", "", ".", "/proc/self/environ", "file:///etc/passwd"),
)
GOOD = ("default", "strict", "seed", "python", "data-analysis")
KEYS = (
    *("extends", "template", "seccomp", "limits", "files", "network", "env", "require", "name", "root", "mounts", "preload"),
    *("source", "target", "writable", "hidden", "defaultAction", "allow", "mode", "memory_bytes", "os", "PATH"),
)
SCALARS = st.one_of(st.sampled_from(PATHS + GOOD), st.integers(), st.booleans(), st.none(), st.floats(), st.text(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
NAMES = st.none() | st.sampled_from(PATHS + GOOD)
ASKS = st.builds(
    CreateAsk,
    policy=NAMES | DOCUMENTS,
    template=NAMES,
    limits=st.dictionaries(st.sampled_from([f.name for f in fields(Limits)]) | st.just("extends"), VALUES, max_size=2),
    env=st.dictionaries(st.sampled_from(KEYS), st.text(max_size=3), max_size=2),
    tier=st.sampled_from(("auto", "native", "fake", "/etc/passwd", "")),
)


@given(ASKS)
def test_no_ask_of_a_user_opens_a_file_or_gets_more_than_a_builtin_template_with_our_filter(ask: CreateAsk) -> None:
    with no_file_is_opened():
        try:
            spec, kind = SERVER.resolve(ME, ask)
        except FumehoodError:
            return
    assert spec.template in TEMPLATES.values() and kind.spec.template is spec.template
    assert spec.seccomp is None
    assert kind.tier == "native"


@pytest.mark.parametrize("caller", [ME, ADMIN], ids=["user", "admin"])
@pytest.mark.parametrize("name", PATHS)
def test_what_names_a_file_of_the_host_is_refused_for_everybody(name: str, caller: Any) -> None:
    for policy in (name, {"extends": name}, {"seccomp": name}, {"extends": "default", "seccomp": name}):
        with no_file_is_opened(), pytest.raises(PolicyError):
            SERVER.resolve(caller, CreateAsk(policy=policy))


@pytest.mark.parametrize("odd", [5, 1.5, True, ["default"], [["extends", "/etc/passwd"]], {"name": "default"}, b"default"])
@pytest.mark.parametrize("key", ["extends", "template", "seccomp"])
def test_a_key_of_another_type_is_refused(key: str, odd: object) -> None:
    with no_file_is_opened(), pytest.raises((PolicyError, Forbidden)):
        SERVER.resolve(ME, CreateAsk(policy={key: odd}))


OWN: list[dict[str, Any]] = [
    {"template": {"name": "mine", "root": "/"}},
    {"template": {"name": "python", "preload": ["os"]}},
    {"template": {"name": "python", "mounts": [{"source": "/etc", "target": "/mnt"}]}},
    {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}},
]


@pytest.mark.parametrize("policy", OWN)
def test_root_preload_mounts_and_filter_are_for_admins(policy: dict[str, Any]) -> None:
    with pytest.raises(Forbidden):
        SERVER.resolve(ME, CreateAsk(policy=policy))
    spec, _ = SERVER.resolve(ADMIN, CreateAsk(policy=policy))
    assert spec.template not in TEMPLATES.values() or spec.seccomp is not None


# What else must be raised for the policy not to contradict itself.
ALONG = {"output_bytes": {"output_kill_bytes": GIB}, "timeout_s": {"lifetime_s": CONFIG.max_lifetime_s}}
ALL_CEILINGS = {**CEILINGS, "lifetime_s": CONFIG.max_lifetime_s, "timeout_s": CONFIG.max_lifetime_s}


@pytest.mark.parametrize("as_document", [False, True])
@pytest.mark.parametrize("name", ALL_CEILINGS)
def test_a_limit_goes_up_to_its_ceiling_and_an_admins_beyond(name: str, as_document: bool) -> None:
    def ask(more: int) -> CreateAsk:
        limits = {**ALONG.get(name, {}), name: ALL_CEILINGS[name] + more}
        if name == "timeout_s" and more:
            limits = {"timeout_s": CONFIG.max_lifetime_s, "lifetime_s": CONFIG.max_lifetime_s + more}
        return CreateAsk(policy={"limits": limits}) if as_document else CreateAsk(limits=limits)

    spec, _ = SERVER.resolve(ME, ask(0))
    assert getattr(spec.limits, name) == ALL_CEILINGS[name]
    with pytest.raises(InvalidInput, match="more than this server gives"):
        SERVER.resolve(ME, ask(1))
    SERVER.resolve(ADMIN, ask(1))


@pytest.mark.parametrize("wrong", [True, False, None, [1], {"a": 1}, float("nan"), float("inf"), "much", "-1", -1, 10**400])
@pytest.mark.parametrize("name", ["pids", "memory_bytes", "timeout_s", "cpus"])
def test_a_limit_that_is_no_amount_is_refused(name: str, wrong: object) -> None:
    with pytest.raises(InvalidInput):
        SERVER.resolve(ME, CreateAsk(limits={name: wrong}))
    if wrong is not None:  # in a document that is the same as leaving it out
        with pytest.raises(InvalidInput):
            SERVER.resolve(ME, CreateAsk(policy={"limits": {name: wrong}}))


def test_a_tier_is_the_servers_own_or_a_stronger_one() -> None:
    fakes = Asks(replace(CONFIG, tier="fake"), lambda tier: LATE)
    assert SERVER.resolve(ME, CreateAsk())[1].tier == "native"
    assert fakes.resolve(ME, CreateAsk())[1].tier == fakes.resolve(ME, CreateAsk(tier="fake"))[1].tier == "fake"
    assert fakes.resolve(ME, CreateAsk(tier="native"))[1].tier == "native"
    for caller in (ME, ADMIN):
        with pytest.raises(Forbidden):
            SERVER.resolve(caller, CreateAsk(tier="fake"))
        with pytest.raises(InvalidInput):
            SERVER.resolve(caller, CreateAsk(tier="weak"))


NAMED = st.builds(
    CreateAsk,
    policy=st.none() | st.sampled_from(("default", "strict", "seed", "nobody's")),
    template=st.none() | st.sampled_from(("python", "data-analysis", "no")),
    limits=st.dictionaries(
        st.sampled_from(("pids", "memory_bytes", "timeout_s", "cpus", "pidz")),
        st.sampled_from((64, 64.0, "64", True, 1, 1.0, "64MiB", 64 * MIB, float(64 * MIB))),
        max_size=2,
    ),
    env=st.dictionaries(st.sampled_from(("A", "B", "not a name")), st.sampled_from(("", "x")), max_size=1),
)


def outcome(server: Asks, ask: CreateAsk) -> object:
    try:
        return server.resolve(ME, ask)
    except FumehoodError as e:
        return type(e), str(e)


@example([CreateAsk(limits={"pids": 64}), CreateAsk(limits={"pids": 64.0})])
@example([CreateAsk(limits={"pids": 64.0}), CreateAsk(limits={"pids": 64})])
@given(st.lists(NAMED, max_size=4))
def test_an_ask_comes_to_the_same_whatever_was_asked_before(asks: list[CreateAsk]) -> None:
    server = Asks(CONFIG, lambda tier: LATE)
    for ask in asks:
        assert outcome(server, ask) == outcome(Asks(CONFIG, lambda tier: LATE), ask)


PLAIN = SandboxSpec()
ELSE: list[dict[str, Any]] = [
    {"template": Template("other")},
    {"template": Template("python", preload=("numpy",))},
    {"limits": Limits(disk_bytes=64 * MIB)},
    {"limits": Limits(timeout_s=3)},
    {"files": FileRules(hidden=("/usr/share",))},
    {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}},
    {"hostname": "other"},
    {"require": frozenset({"seccomp"})},
    {"policy_name": "other"},
]


@pytest.mark.parametrize("late", [{"cpus": 2.0}, {"memory_bytes": 64 * MIB}, {"pids": 9}])
def test_specs_that_differ_in_env_and_late_limits_alone_are_of_one_kind(late: dict[str, Any]) -> None:
    mine = replace(PLAIN, env={"A": "1"}, limits=Limits(**late), policy_hash="another")
    assert kind_of(mine, "native", LATE) == kind_of(PLAIN, "native", LATE)
    assert kind_of(mine, "native", LATE).spec.env == {}
    assert kind_of(mine, "native", LATE).spec.limits == Limits()


@pytest.mark.parametrize("change", ELSE, ids=lambda change: str(next(iter(change))))
def test_whatever_else_differs_makes_another_kind(change: dict[str, Any]) -> None:
    assert kind_of(replace(PLAIN, **change), "native", LATE) != kind_of(PLAIN, "native", LATE)
    assert kind_of(PLAIN, "fake", LATE) != kind_of(PLAIN, "native", LATE)


@pytest.mark.parametrize("lease_s", [0, -1, CONFIG.max_lifetime_s + 1, float("nan"), float("inf")])
def test_a_lease_that_is_not_given_is_refused(lease_s: float) -> None:
    with pytest.raises(InvalidInput):
        SERVER.lease_s(CreateAsk(lease_s=lease_s), PLAIN)
    assert SERVER.lease_s(CreateAsk(), PLAIN) == PLAIN.limits.lifetime_s


@pytest.mark.parametrize("env", [{"A=B": ""}, {"": ""}, {"A": "\0"}, {"A\n": ""}])
def test_an_environment_that_can_not_be_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(PolicyError):
        SERVER.resolve(ME, CreateAsk(env=env))
    assert SERVER.resolve(ME, CreateAsk(policy={"env": {"A": "1", "B": "1"}}, env={"A": "2"}))[0].env == {"A": "2", "B": "1"}


LONG = "/a" * 2_000
LARGE: dict[str, dict[str, Any]] = {
    "unknown keys": {f"k{i}": 1 for i in range(500_000)},
    "wrong names of variables": {"env": {f"1{i}": "" for i in range(500_000)}},
    "mounts without anything": {"template": {"name": "x", "mounts": [{}] * 500_000}},
    "paths that contradict each other": {"files": {"hidden": ["/"] * 256, "writable": [f"/w{i}{LONG}" for i in range(256)]}},
}
WITHIN_S = 2.0  # of the processor; unbounded it is from 3 to 300, in which the server serves nobody else


@pytest.mark.parametrize("what", LARGE)
def test_a_large_policy_is_refused_before_others_wait_for_it(what: str) -> None:
    begun = time.process_time()
    with pytest.raises(PolicyError) as refused:
        SERVER.resolve(ADMIN, CreateAsk(policy=LARGE[what]))
    assert time.process_time() - begun < WITHIN_S
    assert len(refused.value.message) < MIB


def test_many_long_paths_are_held_against_each_other_before_others_wait_for_it() -> None:
    kinds = ("hidden", "read_only", "writable")
    files = {kind: [f"/{kind}{i}{LONG}" for i in range(256)] for kind in kinds}
    begun = time.process_time()
    spec, _ = SERVER.resolve(ME, CreateAsk(policy={"files": files}))
    assert time.process_time() - begun < WITHIN_S
    assert all(len(getattr(spec.files, kind)) >= 256 for kind in kinds)


def test_metadata_has_a_bound_in_all_for_a_page_lists_that_of_a_thousand_sandboxes() -> None:
    SERVER.resolve(ME, CreateAsk(metadata={"a" * 256: "b" * (MAX_METADATA_CHARS - 256)}))
    for labels in ({"a" * 256: "b" * (MAX_METADATA_CHARS - 255)}, {f"k{i}": "b" * 4_096 for i in range(128)}):
        with pytest.raises(InvalidInput, match="the metadata has"):
            SERVER.resolve(ME, CreateAsk(metadata=labels))
