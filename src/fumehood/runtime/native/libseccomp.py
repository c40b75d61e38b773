"""libseccomp.so.2 by ctypes: names of system calls, and rules to BPF. Host supervisor only."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from fumehood.errors import ProfileError, ProtectionUnavailable
from fumehood.runtime.native import bpf

API_LEVEL = 6
FIX = "apt-get install libseccomp2 (2.5 or newer)"
_ARCH_NAMES = {bpf.ARCH_X86_64: "x86_64", bpf.ARCH_I386: "i386"}
_SCMP_ARCH_X32 = 0x4000003E
_UNKNOWN = -1  # __NR_SCMP_ERROR
_ATTR_OPTIMIZE = 8
_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


class Argument(NamedTuple):
    """One comparison of argument `number`, as libseccomp's enum scmp_compare numbers it. All must hold for a rule to match."""

    number: int
    op: int
    a: int
    b: int


class Rule(NamedTuple):
    name: str
    action: int
    arguments: tuple[Argument, ...]


class _Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@cache
def library() -> ctypes.CDLL:
    """Raises ProtectionUnavailable when it is absent or too old."""
    try:
        lib = ctypes.CDLL("libseccomp.so.2")
        level = lib.seccomp_api_get()
    except (OSError, AttributeError) as e:
        raise ProtectionUnavailable("libseccomp is missing", cause=str(e), remediation=FIX) from None
    if level < API_LEVEL:
        cause = f"its API level here is {level}, {API_LEVEL} is needed (libseccomp 2.5, Linux 5.7)"
        raise ProtectionUnavailable("libseccomp is too old", cause=cause, remediation=FIX)
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_release.argtypes = [ctypes.c_void_p]
    lib.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    lib.seccomp_rule_add_array.argtypes = [
        *(ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.POINTER(_Compare)),
    ]
    lib.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    lib.seccomp_syscall_resolve_num_arch.argtypes = [ctypes.c_uint32, ctypes.c_int]
    lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_void_p
    return lib


def number_of(name: str) -> int | None:
    """The x86-64 number; negative for a call of other machines; None when this libseccomp never heard of it."""
    number = library().seccomp_syscall_resolve_name(name.encode())
    return None if number == _UNKNOWN else number


@lru_cache(maxsize=1024)
def name_of(arch: int, number: int) -> tuple[str, str]:
    """(name, architecture). Nameless ones are all "unknown": the guest can't make labels without bound (H15)."""
    x32 = arch == bpf.ARCH_X86_64 and number & bpf.X32_BIT
    token = _SCMP_ARCH_X32 if x32 else arch
    signed = ctypes.c_int(number).value
    pointer = library().seccomp_syscall_resolve_num_arch(token, signed) if signed >= 0 else None
    name = ctypes.string_at(pointer).decode() if pointer else "unknown"
    _libc.free(pointer)
    return name, "x32" if x32 else _ARCH_NAMES.get(arch, "unknown")


@cache
def newest() -> int:
    """The highest x86-64 number that this libseccomp can name. Later calls can't be in any profile."""
    return max(n for n in range(1024) if name_of(bpf.ARCH_X86_64, n)[0] != "unknown")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise ProtectionUnavailable(f"libseccomp refused {what}", cause=os.strerror(-result), remediation=FIX)


def _add(lib: ctypes.CDLL, context: Any, rule: Rule) -> None:
    number = number_of(rule.name)
    if number is None or number < 0:  # a call this machine doesn't have; the default action covers it
        return
    compares = (_Compare * max(1, len(rule.arguments)))(*(_Compare(*a) for a in rule.arguments))
    result = lib.seccomp_rule_add_array(context, rule.action, number, len(rule.arguments), compares)
    if result < 0:
        fix = "remove what contradicts another entry for the same call"
        raise ProfileError(f"the rule for {rule.name} can't be compiled", cause=os.strerror(-result), remediation=fix)


def assemble(default: int, rules: Iterable[Rule]) -> Sequence[bpf.Instruction]:
    """The BPF of a profile for x86-64; other ABIs never reach it (the prologue refuses them).

    Raises ProfileError for rules that contradict each other.
    """
    lib = library()
    context = lib.seccomp_init(default)
    if not context:
        raise ProtectionUnavailable("libseccomp refused the default action", remediation="use ERRNO or ALLOW")
    out = os.memfd_create("fumehood-bpf")
    try:
        _check(lib.seccomp_attr_set(context, _ATTR_OPTIMIZE, 2), "binary-tree optimisation")
        for rule in rules:
            if rule.action != default:  # libseccomp calls a rule that changes nothing an error
                _add(lib, context, rule)
        _check(lib.seccomp_export_bpf(context, out), "to emit the program")
        size = os.lseek(out, 0, os.SEEK_CUR)
        return list(struct.iter_unpack("=HBBI", os.pread(out, size, 0)))  # pyright: ignore[reportReturnType]
    finally:
        os.close(out)
        lib.seccomp_release(context)
