"""How documents become one spec: presets, extends, overrides, contradictions, the hash, and tightening per call."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fumehood.errors import InvalidInput, PolicyError
from fumehood.model import GIB, MIB, Enforcement, FileRules, Limits, Mount, Protection, SandboxSpec, Template
from fumehood.policy.load import preset_names
from fumehood.policy.resolve import TEMPLATES, resolve, tighten
from fumehood.policy.rules import Policy
from fumehood.runtime.base import missing
from fumehood.runtime.host import cgroup_layout
from fumehood.runtime.native import protections


def test_the_default_preset_says_what_the_model_says():
    spec = resolve()
    assert (spec.limits, spec.files, spec.policy_name) == (Limits(), FileRules(), "default")
    assert spec.template == TEMPLATES["python"]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves_under_its_own_name_and_says_what_it_is_for(name):
    spec = resolve(name)
    assert spec.policy_name == name and len(spec.policy_hash) == 64


def test_the_presets_by_kind_of_task_differ_as_promised_m5():
    default, data, code = resolve("default"), resolve("data-analysis"), resolve("codegen")
    assert data.limits.memory_bytes == 2 * GIB and data.limits.disk_bytes > default.limits.disk_bytes
    assert {"numpy", "pandas"} < set(data.template.preload)
    assert code.limits.cpus == 2 and code.limits.pids == 512
    strict = resolve("strict")
    assert strict.limits.memory_bytes == 256 * MIB and strict.limits.timeout_s < default.limits.timeout_s
    assert set(preset_names()) == {"default", "strict", "permissive", "data-analysis", "codegen", "seed"}


def test_the_figures_of_the_seed_are_expressible_m2_m3_m4():
    limits = resolve("seed").limits
    assert limits.cpus * 100_000 == 50_000
    assert limits.memory_bytes == 536870912 and limits.memory_bytes + limits.swap_bytes == 1073741824
    assert (limits.io_read_bps, limits.io_write_bps) == (10485760, 5242880)


def test_strict_requires_every_protection_of_the_native_tier_that_works_unasked_h13():
    known = {p.name for p in protections.probe(cgroup_layout.probe(), rootless=False)}
    assert resolve("strict").require == known - {"block-io"}, "block-io is off until a throttle is set"


@pytest.mark.parametrize("lost", sorted(resolve("strict").require))
def test_strict_is_refused_where_one_protection_is_weaker_or_unknown_h13(lost):
    require = resolve("strict").require
    full = {name: Protection(name, Enforcement.ENFORCED) for name in require}
    assert missing(require, list(full.values())) == []
    weak = {**full, lost: Protection(lost, Enforcement.DEGRADED)}
    assert missing(require, list(weak.values())) == [weak[lost]]
    del full[lost]
    assert [p.name for p in missing(require, list(full.values()))] == [lost]


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(PolicyError, match=r"no preset is named 'sctrict'; known: codegen, data-analysis, default"):
        resolve("sctrict")
    with pytest.raises(PolicyError):
        resolve("..")


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(PolicyError, match="did you mean 'python'"):
        resolve(template="pyton")
    with pytest.raises(PolicyError, match="did you mean 'data-analysis'"):
        resolve({"template": "data-analysi"})


def test_files_extend_files_and_presets_relative_to_themselves(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text('extends = "codegen"\nname = "base"\n[env]\nA = "1"\nB = "1"\n')
    (tmp_path / "sub" / "top.yaml").write_text("extends: ../base.toml\nenv: {B: '2'}\nlimits: {pids: 64}\n")
    spec = resolve(tmp_path / "sub" / "top.yaml")
    assert spec.limits.cpus == 2 and spec.limits.pids == 64 and spec.policy_name == "base"
    assert spec.env == {"A": "1", "B": "2"}


def test_a_circle_of_extends_is_refused_and_shown(tmp_path: Path):
    (tmp_path / "a.toml").write_text('extends = "./b.toml"')
    (tmp_path / "b.toml").write_text('extends = "./a.toml"')
    with pytest.raises(PolicyError, match=r"circle: .*a\.toml -> .*b\.toml -> .*a\.toml"):
        resolve(tmp_path / "a.toml")
    (tmp_path / "self.toml").write_text('extends = "self.toml"')
    with pytest.raises(PolicyError, match="circle"):
        resolve(tmp_path / "self.toml")


def test_an_extension_can_add_protections_but_not_drop_them():
    spec = resolve({"extends": "strict", "require": ["my-own"], "files": {"hidden": ["/a"]}}, overrides={
        "require": [], "files": {"hidden": ["/b"]}})  # fmt: skip
    assert spec.require == resolve("strict").require | {"my-own"} and spec.files.hidden == ("/a", "/b")


def test_overrides_are_laid_over_the_policy_and_checked_like_one():
    spec = resolve("strict", overrides={"limits": {"memory_bytes": "1GiB"}})
    assert spec.limits.memory_bytes == GIB and spec.limits.pids == 32
    assert resolve(overrides={"limits": Limits(pids=9)}).limits == Limits(pids=9)
    with pytest.raises(PolicyError, match="memory_bytes"):
        resolve("strict", overrides={"limits": {"memory": "1GiB"}})
    with pytest.raises(PolicyError, match="overrides can't have extends"):
        resolve("strict", overrides={"extends": "permissive"})


def test_env_of_the_caller_wins_is_checked_and_is_not_in_the_hash():
    spec = resolve({"env": {"A": "1", "B": "1"}}, env={"B": "2"})
    assert spec.env == {"A": "1", "B": "2"}
    assert spec.policy_hash == resolve({"env": {"A": "1", "B": "1"}}).policy_hash
    with pytest.raises(PolicyError, match="no name of an environment variable"):
        resolve(env={"A\nB": "x"})


def test_a_template_of_ones_own_is_kept_whole():
    mount = {"source": "/srv/data", "target": "/data"}
    spec = resolve({"template": {"name": "mine", "preload": ["json"], "mounts": [mount]}})
    assert spec.template == Template("mine", None, ("json",), (Mount("/srv/data", "/data"),))
    assert resolve("codegen", template=Template("given")).template == Template("given")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"files": {"hidden": ["/tmp"]}}, "files.writable /tmp lies in files.hidden /tmp"),
        ({"files": {"read_only": ["/home/user"]}}, "files.writable /home/user lies in files.read_only /home/user"),
        ({"files": {"read_only": ["/etc/x"], "hidden": ["/etc"]}}, "files.read_only /etc/x lies in files.hidden /etc"),
        ({"limits": {"timeout_s": "10m"}}, "timeout_s 600 is over limits.lifetime_s 300"),
        ({"limits": {"output_bytes": "2MiB", "output_kill_bytes": "1MiB"}}, "is over limits.output_kill_bytes"),
    ],
)
def test_contradictions_are_refused(document, said):
    with pytest.raises(PolicyError, match=said):
        resolve(document)


def test_names_that_only_begin_alike_are_no_contradiction_and_narrowing_is_allowed():
    files = {"writable": ["/home/user2", "/tmp"], "read_only": ["/home/user", "/tmp/fixed"], "hidden": ["/tmp/fix"]}
    assert resolve({"files": files}).files.hidden == ("/tmp/fix",)


def test_the_hash_follows_the_effect_not_the_text(tmp_path: Path):
    (tmp_path / "a.toml").write_text('name = "a"\n[limits]\nmemory_bytes = "1GiB"\ntimeout_s = 20\n')
    (tmp_path / "b.yaml").write_text("name: b\nlimits: {timeout_s: 20.0, memory_bytes: 1073741824}\n")
    a, b = resolve(tmp_path / "a.toml"), resolve(tmp_path / "b.yaml")
    assert a.policy_hash == b.policy_hash != resolve().policy_hash
    hashes = [resolve(name).policy_hash for name in preset_names()]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "change",
    [{"limits": {"pids": 99}}, {"files": {"hidden": ["/x"]}}, {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}},
     {"env": {"A": "1"}}, {"require": ["seccomp"]}, {"template": "data-analysis"}],
)  # fmt: skip
def test_every_section_is_in_the_hash(change):
    assert resolve(change).policy_hash != resolve({}).policy_hash


def test_the_spec_of_a_policy_object_equals_that_of_its_mapping():
    assert resolve(Policy(limits={"pids": 9})) == resolve({"limits": {"pids": 9}})
    assert isinstance(resolve(Policy()), SandboxSpec)


@pytest.mark.parametrize(
    "call", [{"timeout_s": "31s"}, {"memory_bytes": GIB}, {"io_read_bps": 0}, {"io_read_bps": "2MB"}, {"cpus": 1.5}]
)
def test_a_call_that_asks_for_more_is_refused_h11(call):
    with pytest.raises(InvalidInput, match="over the sandbox's own"):
        tighten(Limits(io_read_bps=1_000_000), call)


def test_a_call_may_lower_with_units_and_typos_are_refused():
    assert tighten(Limits(), {"timeout_s": "2s", "io_read_bps": "1MB"}) == Limits(timeout_s=2, io_read_bps=1_000_000)
    with pytest.raises(PolicyError, match="timeout_s"):
        tighten(Limits(), {"timeout": 2})


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "pids": st.integers(1, 300),
            "timeout_s": st.floats(0.001, 100),
            "io_write_bps": st.integers(0, 1 << 45),
            "memory_bytes": st.integers(0, 1 << 31),
        },
    )
)
def test_no_call_ever_ends_above_the_sandbox_h11(call):
    own = Limits(io_write_bps=5 * MIB)
    try:
        got = tighten(own, call)
    except InvalidInput:
        return
    assert got.pids <= own.pids and got.timeout_s <= own.timeout_s and got.memory_bytes <= own.memory_bytes
    assert 0 < got.io_write_bps <= own.io_write_bps
