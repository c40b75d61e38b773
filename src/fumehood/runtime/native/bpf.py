"""The calls refused whatever the user's profile says (M6, H4, H25), as a classic-BPF prologue; and an evaluator.

The prologue runs before the profile's own program, so no profile can widen it. It is made in three forms, differing only
in what a refusal returns: `verdict` (ERRNO, evaluated by the supervisor), `notify` (what user code gets) and `floor`
(TRACE: the kernel answers ENOSYS as nobody can be a tracer, and a stacked notify filter outranks it, seccomp(2)).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache

from fumehood.runtime.native.seccomp_install import RENDEZVOUS

ALLOW, LOG, TRACE, NOTIFY, ERRNO = 0x7FFF0000, 0x7FFC0000, 0x7FF00000, 0x7FC00000, 0x00050000
ACTION_MASK, DATA_MASK = 0xFFFF0000, 0x0000FFFF
ARCH_X86_64, ARCH_I386 = 0xC000003E, 0x40000003
X32_BIT = 0x40000000

NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}; NEWTIME can't be given to clone()
_FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
_TTY_REQUESTS = (0x5412, 0x541C, 0x541D, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD
_NEW_LISTENER, _SET_MODE_FILTER = 8, 1

FORBIDDEN = (
    *("ptrace", "kcmp", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd"),
    *("bpf", "perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    *("keyctl", "add_key", "request_key", "open_by_handle_at", "fanotify_init", "fanotify_mark"),
    *("mount", "umount2", "pivot_root", "chroot", "setns", "unshare", "open_tree", "move_mount", "mount_setattr"),
    *("fsopen", "fsconfig", "fsmount", "fspick", "swapon", "swapoff", "quotactl", "quotactl_fd", "acct"),
    *("create_module", "init_module", "finit_module", "delete_module", "query_module", "get_kernel_syms"),
    *("kexec_load", "kexec_file_load", "reboot", "iopl", "ioperm", "modify_ldt", "uselib", "_sysctl"),
    *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex", "syslog", "lookup_dcookie", "nfsservctl"),
    # Its contexts are counted for the whole host (fs.aio-max-nr): one sandbox could take them all from a database.
    *("vhangup", "move_pages", "migrate_pages", "io_setup"),
)
INSPECTED = ("connect", "sendmsg", "sendmmsg")  # BPF can't read a sockaddr, so the supervisor does (M16, H9)

_LD, _AND, _JA, _JEQ, _JGT, _JGE, _JSET, _RET = 0x20, 0x54, 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0 = 0, 4, 16

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, k
Refuse = Callable[[int], int]  # errno -> what the filter returns


def low(index: int) -> Instruction:
    """Loads the low half of an argument: what the kernel keeps of an int, so junk above can't slip by (CVE-2019-7303)."""
    return (_LD, 0, 0, _ARG0 + 8 * index)


def _ret(value: int) -> Instruction:
    return (_RET, 0, 0, value)


def _when(test: int, k: int, value: int) -> list[Instruction]:
    return [(test, 0, 1, k), _ret(value)]


def _only(number: int, body: Sequence[Instruction]) -> list[Instruction]:
    """`body` for this call number alone; the number is loaded again behind it."""
    return [(_JEQ, 0, len(body) + 1, number), *body, (_LD, 0, 0, _NR)]


def _among(load: Instruction, values: Sequence[int], value: int) -> list[Instruction]:
    """Refuse unless the loaded word is one of `values`."""
    return [load, *((_JEQ, len(values) - i, 0, v) for i, v in enumerate(values)), _ret(value)]


def _gate(numbers: Mapping[str, int], refuse: Refuse, newest: int) -> list[Instruction]:
    silent = ERRNO | errno.ENOSYS  # costs no notification: glibc falls back at once, clone3 to the filterable clone
    program = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, ARCH_X86_64), _ret(refuse(errno.EPERM)), (_LD, 0, 0, _NR)]
    program += _when(_JGE, X32_BIT, refuse(errno.EPERM))
    return program + _when(_JEQ, numbers["clone3"], silent) + _when(_JGT, newest, silent)


def _by_argument(numbers: Mapping[str, int], refuse: Refuse) -> list[Instruction]:
    no = refuse(errno.EPERM)
    program: list[Instruction] = []
    for name in ("socket", "socketpair"):
        program += _only(numbers[name], _among(low(0), _FAMILIES, refuse(errno.EAFNOSUPPORT)))
    program += _only(numbers["clone"], [low(0), *_when(_JSET, NAMESPACE_FLAGS, no)])
    program += _only(numbers["personality"], _among(low(0), (0, 0xFFFFFFFF), no))
    terminal = [i for request in _TTY_REQUESTS for i in _when(_JEQ, request, no)]
    # Type '!' is the listener's own ioctl: who could use it would answer its own refusals (H16).
    listener = [(_AND, 0, 0, 0xFF00), *_when(_JEQ, 0x2100, no)]
    return program + _only(numbers["ioctl"], [low(1), *terminal, *listener])


def forbid(numbers: Mapping[str, int], refuse: Refuse, newest: int) -> list[Instruction]:
    """The part that policy, verdict and floor share. `newest`: calls with a higher number get ENOSYS."""
    program = _gate(numbers, refuse, newest)
    for name in FORBIDDEN:
        program += _when(_JEQ, numbers[name], refuse(errno.EPERM))
    return program + _by_argument(numbers, refuse)


def no_second_listener(numbers: Mapping[str, int], refuse: Refuse) -> list[Instruction]:
    """Not in the floor: the agent's children install their own listener above it."""
    check = [low(0), (_JEQ, 0, 3, _SET_MODE_FILTER), low(1), *_when(_JSET, _NEW_LISTENER, refuse(errno.EPERM))]
    return _only(numbers["seccomp"], check)


def inspect(numbers: Mapping[str, int]) -> list[Instruction]:
    """Calls that the supervisor looks at although the profile may allow them."""
    program = _only(numbers["seccomp"], [low(0), *_when(_JEQ, RENDEZVOUS, NOTIFY)])
    for name in INSPECTED:
        program += _when(_JEQ, numbers[name], NOTIFY)
    high = (_LD, 0, 0, _ARG0 + 8 * 4 + 4)
    to_an_address = [low(4), (_JEQ, 0, 2, 0), high, (_JEQ, 1, 0, 0), _ret(NOTIFY)]
    return program + _only(numbers["sendto"], to_an_address)


def notifying(program: Iterable[Instruction]) -> list[Instruction]:
    """The same program with every refusal turned into a notification."""
    kept = (ALLOW, LOG)
    return [_ret(NOTIFY) if code == _RET and k & ACTION_MASK not in kept else (code, jt, jf, k)
            for code, jt, jf, k in program]  # fmt: skip


def pack(program: Iterable[Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@lru_cache(maxsize=8)
def unpack(program: bytes) -> tuple[Instruction, ...]:
    return tuple(struct.iter_unpack("=HBBI", program))  # pyright: ignore[reportReturnType]


def evaluate(program: bytes, data: bytes) -> int:
    """What the kernel would return for these 64 bytes of struct seccomp_data. Raises ValueError on an unknown opcode."""
    code = unpack(program)
    at = accumulator = 0
    while True:
        opcode, jt, jf, k = code[at]
        at += 1
        if opcode == _RET:
            return k
        if opcode == _LD:
            accumulator = int.from_bytes(data[k : k + 4], "little")
        elif opcode == _JA:
            at += k
        elif opcode == _AND:
            accumulator &= k
        else:
            at += jt if _holds(opcode, accumulator, k) else jf


def _holds(opcode: int, accumulator: int, k: int) -> bool:
    if opcode == _JEQ:
        return accumulator == k
    if opcode == _JGT:
        return accumulator > k
    if opcode == _JGE:
        return accumulator >= k
    if opcode == _JSET:
        return bool(accumulator & k)
    raise ValueError(f"BPF opcode {opcode:#x} is not one that libseccomp emits")
