"""What a policy document may say, and that everything else is refused with its place and a way out."""

import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fumehood.errors import FumehoodError, PolicyError, ProfileError
from fumehood.model import Limits
from fumehood.policy.document import parse
from fumehood.policy.load import chain
from fumehood.policy.rules import LimitsSection, Policy


def refusal(document: object) -> str:
    with pytest.raises(PolicyError) as e:
        Policy(**document)  # type: ignore[arg-type]
    assert e.value.cause and e.value.remediation
    return str(e.value)


def test_the_limits_of_a_document_are_the_limits_of_the_model():
    assert set(LimitsSection.model_fields) == {f.name for f in fields(Limits)}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"limits": {"memory": "1GiB"}}, "limits.memory: unknown key; did you mean 'memory_bytes'?"),
        ({"limts": {}}, "limts: unknown key; did you mean 'limits'?"),
        ({"zzz": 1}, "zzz: unknown key; known: description, env, extends"),
        ({"files": {"readonly": []}}, "did you mean 'read_only'?"),
        ({"template": {"name": "mine", "mounts": [{"source": "/a", "target": "/a", "write": True}]}}, "'writable'"),
        ({"limits": {"pids": 1}}, "limits.pids: 1 is out of range: from 8"),
        ({"limits": {"memory_bytes": 0, "swap_bytes": "1GiB"}}, "limits.memory_bytes: 0 is out of range"),
        ({"limits": {"cpus": True}}, "limits.cpus"),
        ({"limits": {"memory_bytes": "lots"}}, "limits.memory_bytes: 'lots' is no amount"),
        ({"limits": {"memory_bytes": "0.3KB", "pids": "9"}}, "limits.pids"),
        ({"limits": {"timeout_s": float("nan")}}, "limits.timeout_s: nan is out of range"),
        ({"files": {"writable": ["tmp"]}}, "not a plain absolute path"),
        ({"files": {"hidden": ["/home/../etc"]}}, "not a plain absolute path"),
        ({"files": {"hidden": ["/etc\0"]}}, "not a plain absolute path"),
        ({"env": {"A=B": "x"}}, "is no name of an environment variable"),
        ({"env": {"A": "x\0y"}}, "NUL"),
        ({"env": {"A": 1}}, "env.A"),
        ({"name": "../x"}, "name"),
        ({"template": {"name": "mine", "preload": ["os; import x"]}}, "template.preload.0"),
        ({"require": "seccomp"}, "require"),
    ],
)
def test_a_wrong_document_is_refused_naming_the_key(document, said):
    assert said in refusal(document)


@pytest.mark.parametrize("network", [{"allow": ["example.org"]}, {"allow": []}, {"mode": "full"}, {"mode": "allow"}])
def test_network_rules_that_are_not_enforced_yet_are_refused_not_ignored_h9_h13(network):
    assert "not yet enforced" in refusal({"network": network})


def test_every_fault_is_reported_at_once():
    assert (said := refusal({"limits": {"pids": 1, "cpus": 0}, "nmae": "x"})).count(";") >= 2
    assert "limits.pids" in said and "limits.cpus" in said and "nmae" in said


@pytest.mark.parametrize(
    ("written", "size"),
    [("512MiB", 512 << 20), ("1 GiB", 1 << 30), ("100MB", 100_000_000), ("1.5gib", 3 << 29), (1 << 26, 1 << 26)],
)
def test_sizes_are_read_as_written(written, size):
    assert Policy(limits={"memory_bytes": written}).limits.memory_bytes == size


@pytest.mark.parametrize(("written", "seconds"), [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), (7, 7), (0.5, 0.5)])
def test_durations_are_read_as_written(written, seconds):
    assert Policy(limits={"timeout_s": written}).limits.timeout_s == seconds


@given(st.text(max_size=20))
def test_any_text_as_a_size_is_read_or_refused_with_a_typed_error(text):
    with suppress(PolicyError):
        assert Policy(limits={"memory_bytes": text}).limits.memory_bytes >= 32 << 20


@given(st.text(alphabet="[]{}=:.,\"'\n abc019-#&*!|>", max_size=60), st.booleans())
def test_any_text_as_a_document_is_parsed_or_refused_with_a_line(text, is_toml):
    with suppress(ValueError):
        assert isinstance(parse(text, is_toml=is_toml)[0], dict)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "[limits]\ncpus = 1\n\npids = 1\n", "a.toml:4: policy refused: limits.pids"),
        ("a.toml", "name = 'a'\nlimits.memory = 3\n", "a.toml:2: policy refused: limits.memory: unknown key"),
        ("a.yaml", "name: a\nlimits:\n  cpus: 1\n  memory: 1GiB\n", "a.yaml:4: policy refused: limits.memory"),
        ("a.toml", "[limits\n", "line 1"),
        ("a.yaml", "limits: [\n", "line 2"),
        ("a.yaml", "env: &a {A: b}\nlimits: *a\n", "aliases are refused"),
        ("a.yaml", "limits: {pids: 64}\nname: x\nlimits: {}\n", "'limits' appears twice"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "constructor"),
        ("a.yaml", "- a\n", "not a mapping"),
        ("a.yaml", "1: a\n", "not a mapping"),
        ("a.yaml", "[" * 5000, "nested too deep"),
        ("a.toml", "x = " + "[" * 5000, "nested too deep"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_and_line(tmp_path: Path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(PolicyError) as e:
        chain(tmp_path / name)
    assert said in str(e.value) and str(tmp_path / name) in str(e.value)


@pytest.mark.parametrize("content", [None, b"\xff", b"#" * (1 << 21)], ids=["absent", "not UTF-8", "2 MiB"])
def test_an_unreadable_file_is_refused(tmp_path: Path, content):
    path = tmp_path / "p.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"p\.toml"):
        chain(path)


def test_a_file_that_would_block_or_never_end_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "p.toml")
    (tmp_path / "q.toml").symlink_to("/dev/zero")
    for name in ("p.toml", "q.toml"):
        with pytest.raises(PolicyError, match="regular file"):
            chain(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"defaultAction": "A",\n', "line 2"), ("[]", "defaultAction"), ('{"defaultAction": 1, "defaultAction": 2}', "twice")],
)
def test_a_wrong_seccomp_file_is_refused_naming_file_and_line_m6(tmp_path: Path, text, said):
    (tmp_path / "s.json").write_text(text)
    (tmp_path / "p.toml").write_text('seccomp = "s.json"')
    with pytest.raises(ProfileError, match=said) as e:
        chain(tmp_path / "p.toml")
    assert "s.json" in str(e.value)


def test_every_refusal_can_be_sent_as_json():
    with pytest.raises(FumehoodError) as e:
        Policy(limits={"pids": 1})
    assert e.value.to_dict()["code"] == "invalid_policy"
    assert e.value.to_dict()["details"]["keys"] == [["limits", "pids"]]
