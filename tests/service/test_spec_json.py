"""What a snapshot's record keeps of a sandbox comes back the same, whatever the caller put in it."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fumehood.errors import StoreFailed
from fumehood.model import FileRules, Limits, Mount, SandboxSpec, Template
from fumehood.policy.load import preset_names
from fumehood.policy.resolve import digest, resolve
from fumehood.service import spec_json

TEXT = st.text(st.characters() | st.sampled_from(["\udce9", "\udc80"]), max_size=8)  # bytes that are no UTF-8 too
PATHS = st.tuples(st.just("/home/user"), st.just("/tmp"))
SPECS = st.builds(
    SandboxSpec,
    template=st.builds(
        Template,
        name=TEXT,
        root=st.none() | TEXT,
        preload=st.lists(TEXT, max_size=2).map(tuple),
        mounts=st.lists(st.builds(Mount, TEXT, TEXT, st.booleans()), max_size=2).map(tuple),
    ),
    limits=st.builds(Limits, cpus=st.floats(0.01, 1024), pids=st.integers(8, 1 << 22), timeout_s=st.floats(0.01, 86_400)),
    files=st.builds(FileRules, writable=PATHS, hidden=st.lists(TEXT, max_size=2).map(tuple)),
    seccomp=st.none() | st.dictionaries(TEXT, st.integers() | st.lists(TEXT, max_size=2), max_size=2),
    env=st.dictionaries(TEXT, TEXT, max_size=3),
    hostname=TEXT,
    require=st.frozensets(TEXT, max_size=3),
    policy_name=TEXT,
    policy_hash=TEXT,
)

GOOD = spec_json.to_text(SandboxSpec())


@given(SPECS)
@example(SandboxSpec(env={"A": "\udce9\0\u2028"}))
def test_every_spec_comes_back_the_same_in_ascii(spec: SandboxSpec) -> None:
    text = spec_json.to_text(spec)
    assert text.isascii() and spec_json.from_text(text) == spec


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_the_same_hash_afterwards(name: str) -> None:
    spec = resolve(name)
    assert digest(spec_json.from_text(spec_json.to_text(spec))) == digest(spec) == spec.policy_hash


def test_no_field_is_left_out() -> None:
    assert json.loads(spec_json.to_text(SandboxSpec())).keys() == {f.name for f in fields(SandboxSpec)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "7",
        '{"template": 1}',
        GOOD.replace('"pids":128', '"pids":1'),
        GOOD.replace("hostname", "hostnome"),
    ],
)
def test_a_record_that_is_none_says_so(text: str) -> None:
    with pytest.raises(StoreFailed, match="damaged, or of another version"):
        spec_json.from_text(text)
