"""Seccomp profiles to BPF, in the host supervisor. The programs are installed inside by seccomp_install.py.

Every user-code process gets the policy program, stacked on the floor that it inherits from the agent. Refusals of the
policy are notifications (counted, answered by notify.py); those of the floor need no supervisor. M6, M16, H4, H25.
"""

from __future__ import annotations

import errno
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from fumehood.errors import ProfileError
from fumehood.runtime.native import bpf
from fumehood.runtime.native.libseccomp import assemble, newest, number_of
from fumehood.runtime.native.profile import Fault, Path, flatten

MAX_PROFILE_BYTES = 1 << 20
_GAP = re.compile(r"[ \t\r\n,:]*")
_NUMBERED = (
    *(*bpf.FORBIDDEN, *bpf.INSPECTED),
    *("socket", "socketpair", "clone", "clone3", "personality", "ioctl", "seccomp", "sendto"),
)


def load_profile(text: str, source: str) -> dict[str, Any]:
    """The profile as parsed JSON, checked. Raises ProfileError that names the line of the offending entry."""
    try:
        profile = _parse(text)
        flatten(profile)
    except json.JSONDecodeError as e:
        raise Fault((), f"not JSON: {e.msg} (column {e.colno})").error(source, e.lineno) from None
    except Fault as e:
        raise e.error(source, _line_of(text, e.path)) from None
    except RecursionError:
        raise Fault((), "nested too deeply").error(source, 1) from None
    return profile


def _parse(text: str) -> dict[str, Any]:
    if len(text) > MAX_PROFILE_BYTES:
        raise Fault((), f"longer than {MAX_PROFILE_BYTES} bytes")
    return json.loads(text, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):  # JSON keeps the last one: a second "syscalls" would drop the first in silence
        raise Fault((), f"a key is given twice among {', '.join(sorted(made))}")
    return made


def _line_of(text: str, path: Path) -> int:
    """The line where the value at `path` starts; that of the deepest existing parent, if there is none."""
    at = _skip(text, 0)
    for step in path:
        found = next((p for key, p in _members(text, at) if key == step), None)
        if found is None:
            break
        at = found
    return text.count("\n", 0, at) + 1


def _skip(text: str, at: int) -> int:
    return _GAP.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]: it also matches nothing


def _members(text: str, at: int) -> Iterator[tuple[str | int, int]]:
    """(key or index, offset) of each member of the object or list at offset `at`."""
    closing, index, scan = {"{": "}", "[": "]"}.get(text[at], ""), 0, json.JSONDecoder().raw_decode
    at = _skip(text, at + 1)
    while closing and text[at] != closing:
        key: str | int = index
        if closing == "}":
            key, at = scan(text, at)
            at = _skip(text, at)
        yield key, at
        at, index = _skip(text, scan(text, at)[1]), index + 1


@cache
def default_profile() -> dict[str, Any]:
    """fumehood's own profile: what CPython, its scientific libraries, node and compilers call, and no more."""
    source = files("fumehood.runtime.native") / "default_seccomp.json"
    return load_profile(source.read_text("utf-8"), source.name)


@cache
def _numbers() -> dict[str, int]:
    numbers = {name: number_of(name) for name in _NUMBERED}
    if missing := [name for name, n in numbers.items() if n is None or n < 0]:
        raise ProfileError(f"this libseccomp has no number for {', '.join(missing)}")
    return {name: n for name, n in numbers.items() if n is not None}


def _own_rules(profile: Mapping[str, Any] | None) -> list[bpf.Instruction]:
    try:
        return list(assemble(*flatten(default_profile() if profile is None else profile)))
    except Fault as e:
        raise e.error("given as an object", None) from None


def refusing(profile: Mapping[str, Any] | None, names: Sequence[str]) -> dict[str, Any]:
    """The profile without any rule for `names`, which are then refused with EPERM."""
    base = default_profile() if profile is None else profile
    kept = [entry | {"names": [n for n in entry["names"] if n not in names]} for entry in base.get("syscalls", [])]
    refused = {"names": list(names), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    return {**base, "syscalls": [*(entry for entry in kept if entry["names"]), refused]}


def compile_policy(profile: Mapping[str, Any] | None) -> bytes:
    """struct sock_filter[] for user code; None = the default profile. Raises ProfileError, ProtectionUnavailable."""
    numbers = _numbers()
    prologue = bpf.forbid(numbers, lambda _: bpf.NOTIFY, newest())
    prologue += bpf.no_second_listener(numbers, lambda _: bpf.NOTIFY) + bpf.inspect(numbers)
    return bpf.pack(prologue + bpf.notifying(_own_rules(profile)))


def compile_floor() -> bytes:
    """struct sock_filter[] for the agent and all below it: the always-forbidden calls get ENOSYS, with no supervisor."""
    return bpf.pack([*bpf.forbid(_numbers(), lambda _: bpf.TRACE, newest()), (0x06, 0, 0, bpf.ALLOW)])


def refused_errno(profile: Mapping[str, Any] | None) -> Callable[[bytes], int]:
    """What a notified call is answered with: struct seccomp_data (64 bytes) -> errno, 0 = the profile allows it.

    It evaluates the profile's program with its real actions, so per-entry errnoRet and conditions hold exactly.
    """
    numbers = _numbers()
    prologue = bpf.forbid(numbers, _errno, newest()) + bpf.no_second_listener(numbers, _errno)
    program = bpf.pack(prologue + _own_rules(profile))

    def answer(data: bytes) -> int:
        verdict = bpf.evaluate(program, data)
        if verdict & bpf.ACTION_MASK == bpf.ERRNO:
            return verdict & bpf.DATA_MASK
        return 0 if verdict in (bpf.ALLOW, bpf.LOG) else errno.EPERM

    return answer


def _errno(number: int) -> int:
    return bpf.ERRNO | number


def seccomp_data(number: int, args: tuple[int, ...] = (), arch: int = bpf.ARCH_X86_64) -> bytes:
    """struct seccomp_data, to ask `refused_errno` about a call without making it (policy explain, tests)."""
    return struct.pack("=IIQ6Q", number, arch, 0, *(*args, 0, 0, 0, 0, 0, 0)[:6])
