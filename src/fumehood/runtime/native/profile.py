"""The OCI/Docker seccomp JSON: checked, then flattened to rules. Every complaint carries the path of its entry (M6)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from fumehood.errors import ProfileError
from fumehood.runtime.native import bpf
from fumehood.runtime.native.libseccomp import Argument, Rule, number_of

Path = tuple[str | int, ...]

_ALLOWING = {"SCMP_ACT_ALLOW": bpf.ALLOW, "SCMP_ACT_LOG": bpf.LOG}
_REFUSING = (
    *("SCMP_ACT_ERRNO", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"),
    *("SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD"),
)
_OPS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
_TOP = {"defaultAction", "defaultErrnoRet", "architectures", "archMap", "flags", "syscalls", "comment", "$schema"}
_ENTRY = {"name", "names", "action", "errnoRet", "args", "includes", "excludes", "comment"}
_CONDITIONS = {"caps", "arches", "minKernel"}
_NAME = re.compile(r"_?[a-z][a-z0-9_]{0,63}\Z")
_OURS = {"amd64", "x86_64"}


class Fault(Exception):
    """Something wrong at `path` of the document."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(why)
        self.path, self.why = path, why

    def error(self, source: str, line: int | None) -> ProfileError:
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path).lstrip(".") or "the profile"
        at = f"{source}, line {line}" if line else source
        return ProfileError(
            f"bad seccomp profile {at}: {where}: {self.why}",
            cause=self.why,
            remediation=f"correct {where} in {at}",
            source=source,
            line=line,
        )


def _object(value: Any, path: Path, keys: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Fault(path, "must be an object")
    mapping = cast(Mapping[str, Any], value)
    for key in mapping:
        if key not in keys:  # a misspelt key would weaken the profile in silence
            raise Fault((*path, key), "unknown key")
    return mapping


def _list(value: Any, path: Path) -> Sequence[Any]:
    if value is None:  # Docker's own files say "args": null
        return ()
    if not isinstance(value, list | tuple):
        raise Fault(path, "must be a list")
    return cast(Sequence[Any], value)


def _integer(value: Any, path: Path, top: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= top:
        raise Fault(path, f"must be an integer from 0 to {top}")
    return value


def _action(where: Mapping[str, Any], path: Path, key: str, errno_key: str, fallback: int) -> int:
    name = str(where.get(key))
    if name in _ALLOWING:
        return _ALLOWING[name]
    if name not in _REFUSING:
        raise Fault((*path, key) if key in where else path, f"{key} must be one of {', '.join((*_ALLOWING, *_REFUSING))}")
    number = where.get(errno_key)
    code = fallback if number is None else _integer(number, (*path, errno_key), 4095)
    if code == 0:  # answering "done" without doing it
        raise Fault((*path, errno_key), "an errno of 0 would report success")
    return bpf.ERRNO | (code if name == "SCMP_ACT_ERRNO" else errno.EPERM)


def _argument(value: Any, path: Path) -> Argument:
    entry = _object(value, path, {"index", "value", "valueTwo", "op"})
    op = entry.get("op")
    code = _OPS.get(op.removeprefix("SCMP_CMP_")) if isinstance(op, str) else None
    if code is None or not str(op).startswith("SCMP_CMP_"):
        raise Fault((*path, "op") if "op" in entry else path, f"op must be SCMP_CMP_ and one of {', '.join(_OPS)}")
    for key in ("index", "value"):
        if key not in entry:
            raise Fault(path, f"{key} is missing")
    index = _integer(entry["index"], (*path, "index"), 5)
    value_one = _integer(entry["value"], (*path, "value"), (1 << 64) - 1)
    return Argument(index, code, value_one, _integer(entry.get("valueTwo") or 0, (*path, "valueTwo"), (1 << 64) - 1))


def _names(entry: Mapping[str, Any], path: Path) -> list[str]:
    if ("name" in entry) == bool(entry.get("names")):
        raise Fault(path, "needs either name or names")
    single = "name" in entry
    names = [entry["name"]] if single else _list(entry["names"], (*path, "names"))
    for i, name in enumerate(names):
        if not isinstance(name, str) or not _NAME.match(name):
            raise Fault((*path, "name") if single else (*path, "names", i), f"{name!r} is no name of a system call")
    return list(names)


def _kernel(text: Any, path: Path) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    if not match:
        raise Fault(path, "must be a kernel version such as 5.4")
    return int(match[1]), int(match[2])


def _matches(value: Any, path: Path) -> Iterator[bool]:
    """One truth for each condition given. The sandbox holds no capability at all."""
    conditions = _object(value or {}, path, _CONDITIONS)
    if _list(conditions.get("caps"), (*path, "caps")):
        yield False
    if arches := _list(conditions.get("arches"), (*path, "arches")):
        yield any(str(a) in _OURS for a in arches)
    if conditions.get("minKernel"):
        yield _kernel(os.uname().release, path) >= _kernel(conditions["minKernel"], (*path, "minKernel"))


def _applies(entry: Mapping[str, Any], path: Path) -> bool:
    included = list(_matches(entry.get("includes"), (*path, "includes")))
    excluded = list(_matches(entry.get("excludes"), (*path, "excludes")))
    return all(included) and not any(excluded)


def _alternatives(arguments: Sequence[Argument]) -> list[tuple[Argument, ...]]:
    # libseccomp takes one comparison per argument; runc reads a repeated index as "any of these", so we do too.
    if len({a.number for a in arguments}) < len(arguments):
        return [(a,) for a in arguments]
    return [tuple(arguments)]


def _entry(value: Any, path: Path, fallback: int) -> Iterator[Rule]:
    entry = _object(value, path, _ENTRY)
    action = _action(entry, path, "action", "errnoRet", fallback)
    names = _names(entry, path)
    arguments = [_argument(a, (*path, "args", i)) for i, a in enumerate(_list(entry.get("args"), (*path, "args")))]
    applies = _applies(entry, path)
    for i, name in enumerate(names):
        if action not in _ALLOWING.values() and number_of(name) is None:
            where = (*path, "name") if "name" in entry else (*path, "names", i)
            raise Fault(where, f"no system call is called {name} here (newer ones get ENOSYS without being listed)")
    if applies:
        yield from (Rule(name, action, a) for name in names for a in _alternatives(arguments))


def _architectures(profile: Mapping[str, Any]) -> None:
    known = [str(a) for a in _list(profile.get("architectures"), ("architectures",))]
    for i, item in enumerate(_list(profile.get("archMap"), ("archMap",))):
        entry = _object(item, ("archMap", i), {"architecture", "subArchitectures"})
        known.append(str(entry.get("architecture")))
    if known and "SCMP_ARCH_X86_64" not in known:
        raise Fault(("architectures" if profile.get("architectures") else "archMap",), "SCMP_ARCH_X86_64 is not in it")


def flatten(profile: Any) -> tuple[int, list[Rule]]:
    """(default action, rules) of a parsed document. Raises Fault; ProtectionUnavailable without libseccomp."""
    top = _object(profile, (), _TOP)
    fallback = top.get("defaultErrnoRet")
    fallback = errno.EPERM if fallback is None else _integer(fallback, ("defaultErrnoRet",), 4095)
    default = _action(top, (), "defaultAction", "defaultErrnoRet", errno.EPERM)
    _architectures(top)
    _list(top.get("flags"), ("flags",))  # LOG, TSYNC, SPEC_ALLOW: none of them changes what is allowed
    rules: list[Rule] = []
    always: dict[str, int] = {}
    sometimes: dict[str, set[int]] = {}
    for i, entry in enumerate(_list(top.get("syscalls"), ("syscalls",))):
        for rule in _entry(entry, ("syscalls", i), fallback):
            _no_contradiction(rule, default, always, sometimes, ("syscalls", i))
            rules.append(rule)
    return default, rules


def _no_contradiction(rule: Rule, default: int, always: dict[str, int], sometimes: dict[str, set[int]], path: Path) -> None:
    """libseccomp lets an unconditional rule swallow conditional ones: a refusal would be lost in silence."""
    if rule.arguments:
        sometimes.setdefault(rule.name, set()).add(rule.action)
    elif rule.action != default and always.setdefault(rule.name, rule.action) != rule.action:
        raise Fault(path, f"{rule.name} has another action in an earlier entry")
    if rule.name in always and sometimes.get(rule.name, set()) - {always[rule.name]}:
        raise Fault(path, f"{rule.name} has one action for every argument and another action as well")
