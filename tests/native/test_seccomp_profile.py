"""M6: OCI/Docker profiles load, are enforced as written, and say where they are wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cell import call, confined
from hypothesis import given
from hypothesis import strategies as st

from fumehood.errors import ProfileError, ProtectionUnavailable
from fumehood.runtime.native import bpf, libseccomp, seccomp
from fumehood.runtime.native.libseccomp import number_of

SEED = Path(__file__).parent / "seed_profile.json"


THREE = ("getuid", "getgid", "getppid")


def ask(profile: Any, name: str, *args: int) -> int:
    number = number_of(name)
    assert number is not None
    return seccomp.refused_errno(profile)(seccomp.seccomp_data(number, args))


def profile(*entries: dict[str, Any], default: str = "SCMP_ACT_ERRNO", **top: Any) -> dict[str, Any]:
    return seccomp.load_profile(json.dumps({"defaultAction": default, "syscalls": list(entries), **top}), "test")


def allow(*names: str, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", **more}


def test_the_profile_of_the_seed_text_is_enforced_on_a_real_process() -> None:
    """It refuses even mmap and exit_group, so the child says what it has to say by write() and is then killed."""
    seed = seccomp.load_profile(SEED.read_text("utf-8"), SEED.name)
    report, write_end = os.pipe()

    def probe() -> None:
        answers = [
            *(call("getuid"), call("socket", 1, 1, 0), call("socket", 2, 1, 0)),
            *(call("execve", 1, 0, 0), call("execve", 0, 0, 0)),
        ]
        os.write(write_end, json.dumps(answers).encode())

    out = confined(probe, seccomp.compile_policy(seed), seccomp.refused_errno(seed))
    os.close(write_end)
    answers = json.loads(os.read(report, 4096))
    os.close(report)
    assert answers[0] == -errno.EPERM
    assert answers[1] >= 0, "socket with AF_UNIX (argument 0 equal to 1) is what the profile allows"
    assert answers[2:4] == [-errno.EPERM, -errno.EPERM]
    assert answers[4] == -errno.EFAULT, "execve with argument 0 equal to 0 passes the profile; the kernel has the rest"
    names = [name for name, _ in out.refused]
    assert {"getuid", "socket", "execve"} <= set(names)
    assert "exit_group" in names and os.WTERMSIG(out.status) in (signal.SIGSEGV, signal.SIGKILL)


def test_without_the_profile_the_same_calls_go_through() -> None:
    everything = {"defaultAction": "SCMP_ACT_ALLOW"}
    out = confined(lambda: call("getuid"), seccomp.compile_policy(everything), seccomp.refused_errno(everything))
    assert (out.report, out.refused) == (os.getuid(), [])


def test_errno_of_an_entry_and_of_the_default_are_what_the_process_sees() -> None:
    made = profile(
        allow("read", "write", "close", "ioctl", "exit_group", "getpid", "mmap", "munmap", "futex"),
        {"names": ["getuid"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENODATA},
        {"names": ["getgid"], "action": "SCMP_ACT_KILL_PROCESS"},
        defaultErrnoRet=errno.ENOSYS,
    )
    out = confined(lambda: [call(n) for n in THREE], seccomp.compile_policy(made), seccomp.refused_errno(made))
    assert out.report == [-errno.ENODATA, -errno.EPERM, -errno.ENOSYS]
    assert [n for n, _ in out.refused][:3] == [*THREE]


@pytest.mark.parametrize(
    ("op", "value", "two", "passes", "fails"),
    [
        ("NE", 5, 0, 4, 5), ("LT", 5, 0, 4, 5), ("LE", 5, 0, 5, 6), ("EQ", 5, 0, 5, 4), ("GE", 5, 0, 5, 4),
        ("GT", 5, 0, 6, 5), ("MASKED_EQ", 0xF0, 0x30, 0x3F, 0x4F), ("EQ", 1 << 40, 0, 1 << 40, 0),
    ],
)  # fmt: skip
def test_every_comparison_means_what_oci_says(op: str, value: int, two: int, passes: int, fails: int) -> None:
    argument = {"index": 2, "value": value, "valueTwo": two, "op": f"SCMP_CMP_{op}"}
    made = profile(allow("lseek", args=[argument]))
    assert ask(made, "lseek", 0, 0, passes) == 0
    assert ask(made, "lseek", 0, 0, fails) == errno.EPERM


def test_arguments_all_have_to_hold_and_a_repeated_index_means_any() -> None:
    def eq(index: int, value: int) -> dict[str, Any]:
        return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}

    both = profile(allow("lseek", args=[eq(0, 1), eq(1, 2)]))
    assert [ask(both, "lseek", *a) for a in ((1, 2), (1, 3), (0, 2))] == [0, errno.EPERM, errno.EPERM]
    either = profile(allow("lseek", args=[eq(0, 1), eq(0, 2)]))
    assert [ask(either, "lseek", a) for a in (1, 2, 3)] == [0, 0, errno.EPERM]


def test_docker_conditions_are_resolved_for_a_process_without_capabilities_on_this_machine() -> None:
    made = profile(
        allow("getpid", includes={"caps": ["CAP_SYS_ADMIN"]}),
        allow("getppid", excludes={"caps": ["CAP_SYS_ADMIN"]}),
        allow("getuid", includes={"arches": ["arm64"]}),
        allow("geteuid", includes={"arches": ["amd64", "x32"]}),
        allow("getgid", includes={"minKernel": "99.0"}),
        allow("getegid", includes={"minKernel": "4.8"}),
        allow("gettid", excludes={"arches": ["s390x"]}, args=None, comment=""),
        archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]}],
    )
    expected = {"getpid": 1, "getppid": 0, "getuid": 1, "geteuid": 0, "getgid": 1, "getegid": 0, "gettid": 0}
    assert {name: ask(made, name) for name in expected} == expected


def test_names_that_this_machine_lacks_are_skipped_where_they_allow_and_an_error_where_they_refuse() -> None:
    assert ask(profile(allow("arm_fadvise64_64", "not_yet_invented", "getpid")), "getpid") == 0
    with pytest.raises(ProfileError, match="no system call is called ptrase"):
        profile({"names": ["ptrase"], "action": "SCMP_ACT_ERRNO"}, default="SCMP_ACT_ALLOW")


@pytest.mark.parametrize("name", ["ptrace", "kcmp", "process_vm_readv", "mount", "bpf", "io_uring_setup"])
def test_a_profile_cannot_allow_what_is_always_forbidden(name: str) -> None:
    assert ask(profile(allow(name)), name) == errno.EPERM


def test_the_default_profile_allows_what_python_needs_and_nothing_that_is_forbidden() -> None:
    needed = ("read", "mmap", "futex", "execve", "exit_group", "getrandom", "epoll_wait", "connect", "rseq")
    assert {ask(None, name) for name in needed} == {0}
    listed = {n for e in seccomp.default_profile()["syscalls"] for n in e["names"]}
    assert not listed & set(bpf.FORBIDDEN)


BAD = [
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n "syscalls": [\n  {"names": ["read"]\n}', 4, "not JSON"),
    ("[]", 1, "must be an object"),
    ("{}", 1, "defaultAction must be one of"),
    ('{\n"defaultAction": "SCMP_ACT_NOPE"}', 2, "must be one of"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n\n"sycalls": []}', 3, "unknown key"),
    ('{"defaultAction": "SCMP_ACT_ERRNO", "defaultAction": "SCMP_ACT_ALLOW"}', 1, "given twice"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"defaultErrnoRet": 0}', 2, "would report success"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"defaultErrnoRet": 5000}', 2, "from 0 to 4095"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"architectures": ["SCMP_ARCH_ARM"]}', 2, "SCMP_ARCH_X86_64 is not in it"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": {}}', 2, "must be a list"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [\n{"names": ["a"], "action": "SCMP_ACT_ALLOW"},\n7]}', 4, "object"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [\n{"action": "SCMP_ACT_ALLOW"}]}', 3, "either name or names"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [{"names": ["read",\n"o pen"],\n"action": "SCMP_ACT_ALLOW"}]}', 3,
     "no name of a system call"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"args": [\n'
     '{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}', 4, "from 0 to 5"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"args": [\n'
     '{"index": 1,\n"value": -1, "op": "SCMP_CMP_EQ"}]}]}', 5, "must be an integer"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n"args": [\n'
     '{"index": 1, "value": 1,\n"op": "=="}]}]}', 5, "op must be"),
    ('{"defaultAction": "SCMP_ACT_ERRNO",\n"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",\n'
     '"includes": {"minKernel": "new"}}]}', 3, "kernel version"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "why"), BAD)
def test_a_bad_profile_is_refused_with_the_line_that_is_wrong(text: str, line: int, why: str) -> None:
    with pytest.raises(ProfileError, match=f"my.json, line {line}: .*{why}") as caught:
        seccomp.load_profile(text, "my.json")
    assert caught.value.details["line"] == line
    assert caught.value.remediation


def test_a_profile_nested_beyond_reason_or_too_long_is_refused() -> None:
    with pytest.raises(ProfileError, match="nested too deeply"):
        seccomp.load_profile("[" * 100_000, "deep.json")
    with pytest.raises(ProfileError, match="longer than"):
        seccomp.load_profile(" " * (seccomp.MAX_PROFILE_BYTES + 1), "long.json")


IF_SEVEN = {"args": [{"index": 0, "value": 7, "op": "SCMP_CMP_EQ"}]}
REFUSE = {"names": ["lseek"], "action": "SCMP_ACT_ERRNO"}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (allow("lseek"), REFUSE | IF_SEVEN),
        (REFUSE | IF_SEVEN, allow("lseek")),
        (allow("lseek"), REFUSE | {"errnoRet": 5}),
        (REFUSE | {"errnoRet": 5}, allow("lseek", **IF_SEVEN)),
        (allow("lseek", **IF_SEVEN), REFUSE | {"errnoRet": 5} | IF_SEVEN),
    ],
)
def test_entries_that_contradict_each_other_are_refused_rather_than_guessed_at(first: Any, second: Any) -> None:
    with pytest.raises(ProfileError, match="lseek"):
        seccomp.compile_policy(profile(first, second))


def test_entries_that_only_repeat_or_split_a_rule_are_fine() -> None:
    split = profile(REFUSE, allow("lseek", **IF_SEVEN), allow("lseek", **IF_SEVEN))
    assert [ask(split, "lseek", a) for a in (7, 8)] == [0, errno.EPERM]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["SCMP_ACT_ALLOW", "read"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["defaultAction", "syscalls", "names", "name", "action", "args", "includes", "caps", "index", "op", "flags"]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(_json)
def test_any_json_is_either_a_profile_or_a_profile_error(value: Any) -> None:
    try:
        seccomp.compile_policy(seccomp.load_profile(json.dumps(value, indent=1), "fuzz"))
    except ProfileError as e:
        assert e.details["line"] is None or e.details["line"] >= 1


@given(st.integers(0, 1 << 32), st.lists(st.integers(0, (1 << 64) - 1), min_size=6, max_size=6))
def test_the_notifying_program_stops_exactly_what_the_verdict_refuses(number: int, args: list[int]) -> None:
    """The two programs must never disagree: what is refused is notified, or answered ENOSYS in silence."""
    data = seccomp.seccomp_data(number & 0xFFFFFFFF, tuple(args))
    refused = seccomp.refused_errno(None)(data)
    action = bpf.evaluate(POLICY, data)
    if refused:
        assert action == bpf.NOTIFY or (action == bpf.ERRNO | errno.ENOSYS and refused == errno.ENOSYS)
    else:
        assert action in (bpf.ALLOW, bpf.NOTIFY)


POLICY = seccomp.compile_policy(None)


def test_without_libseccomp_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    libseccomp.library.cache_clear()
    monkeypatch.setattr(libseccomp.ctypes, "CDLL", absent)
    with pytest.raises(ProtectionUnavailable) as caught:
        libseccomp.library()
    assert "apt-get install libseccomp2" in caught.value.remediation
    libseccomp.library.cache_clear()
