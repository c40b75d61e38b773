"""M6, H4, H25: what user code can't call, whatever its profile says; and that only the filter stands in the way."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pytest
from cell import Outcome, call, confined, in_child, raw

from fumehood.runtime.native import bpf, capabilities, seccomp, seccomp_install

ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW"}
BAD = 0xFFFFFFFFFFFFF000  # an argument that no call takes: harmless even where the barrier fails
MOUNTED_ON_BAD_POINTERS = ("mount", "umount2", "bpf", "perf_event_open", "keyctl", "process_vm_readv", "ptrace", "kcmp")
NEW_NAMESPACES = {"NEWUSER": 1 << 28, "NEWNET": 1 << 30, "NEWNS": 1 << 17, "NEWPID": 1 << 29, "NEWIPC": 1 << 27,
                  "NEWUTS": 1 << 26, "NEWCGROUP": 1 << 25}  # fmt: skip


def under_policy(probe: Callable[[], Any], profile: Any = ALLOW_ALL, **more: Any) -> Outcome:
    return confined(probe, seccomp.compile_policy(profile), seccomp.refused_errno(profile), **more)


def under_floor(probe: Callable[[], Any]) -> Outcome:
    def body() -> Any:
        capabilities.no_new_privs()
        seccomp_install.install(floor)
        return probe()

    floor = seccomp.compile_floor()
    return in_child(body)


def with_bad_arguments(name: str) -> int:
    return call(name, *[BAD] * 6)


@pytest.mark.parametrize("name", bpf.FORBIDDEN)
def test_a_forbidden_call_is_refused_counted_and_named_even_if_the_profile_allows_everything(name: str) -> None:
    out = under_policy(lambda: with_bad_arguments(name))
    assert out.report == -errno.EPERM
    assert out.refused == [(name, "x86_64")]


def test_the_floor_refuses_every_forbidden_call_without_a_supervisor() -> None:
    out = under_floor(lambda: {name: with_bad_arguments(name) for name in bpf.FORBIDDEN})
    assert set(out.report.values()) == {-errno.ENOSYS}
    assert out.status == 0


def test_without_the_filters_the_same_calls_reach_the_kernel() -> None:
    out = in_child(lambda: [with_bad_arguments(name) for name in MOUNTED_ON_BAD_POINTERS])
    assert not {-errno.EPERM, -errno.ENOSYS} & set(out.report)


def test_a_refusal_of_the_policy_outranks_the_floor_so_that_it_is_counted() -> None:
    out = under_policy(lambda: with_bad_arguments("bpf"), floor=seccomp.compile_floor())
    assert (out.report, out.refused) == (-errno.EPERM, [("bpf", "x86_64")])


@pytest.mark.root
@pytest.mark.parametrize("name", NEW_NAMESPACES)
def test_no_namespace_can_be_made_by_clone(name: str) -> None:
    def clone() -> int:
        pid = call("clone", NEW_NAMESPACES[name] | signal.SIGCHLD)
        if pid == 0:
            os._exit(0)
        return pid

    out = under_policy(clone)
    assert (out.report, out.refused) == (-errno.EPERM, [("clone", "x86_64")])
    assert under_floor(clone).report == -errno.ENOSYS
    assert in_child(clone).report > 0, "without the barrier it must work, else this test proves nothing"


def test_clone3_answers_enosys_in_silence_and_threads_and_forks_still_work() -> None:
    def probe() -> list[Any]:
        import subprocess
        import threading

        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(1))
        thread.start()
        thread.join()
        ran = subprocess.run(["/bin/sh", "-c", "echo hi"], capture_output=True, check=True).stdout.decode()
        return [call("clone3", 0, 0), seen, ran]

    out = under_policy(probe, None, floor=seccomp.compile_floor())
    assert (out.report, out.refused) == ([-errno.ENOSYS, [1], "hi\n"], [])


def test_calls_newer_than_the_table_answer_enosys_so_that_libraries_fall_back() -> None:
    out = under_policy(lambda: raw(460, BAD), None)
    assert (out.report, out.refused) == (-errno.ENOSYS, [])


FAMILIES = {"NETLINK": 16, "PACKET": 17, "ALG": 38, "VSOCK": 40, "BLUETOOTH": 31, "KEY": 15, "TIPC": 30, "XDP": 44}


@pytest.mark.parametrize("name", FAMILIES)
def test_address_families_other_than_unix_and_inet_are_refused(name: str) -> None:
    junk = 1 << 32  # the kernel drops the upper half, so must the filter (CVE-2019-7303)
    out = under_policy(lambda: [call("socket", FAMILIES[name], 3, 0), call("socket", FAMILIES[name] | junk, 3, 0)])
    assert out.report == [-errno.EAFNOSUPPORT] * 2
    assert out.refused == [("socket", "x86_64")] * 2


def test_the_three_allowed_families_work_and_netlink_works_without_the_filter() -> None:
    def probe() -> bool:
        return all(call("socket", f, 1, 0) >= 0 for f in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6))

    assert under_policy(probe, None).report is True
    assert in_child(lambda: call("socket", socket.AF_NETLINK, 3, 0)).report >= 0


def test_socketpair_is_for_unix_sockets_only() -> None:
    pair = ctypes.create_string_buffer(8)
    out = under_policy(lambda: call("socketpair", 30, 2, 0, ctypes.addressof(pair)))  # AF_TIPC
    assert (out.report, out.refused) == (-errno.EAFNOSUPPORT, [("socketpair", "x86_64")])


def _machine_code(code: bytes) -> Callable[[], int]:
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    function.page = page  # type: ignore[attr-defined] - keeps it mapped
    return function


# push rbx; mov eax, 359 (socket); mov ebx, 38 (AF_ALG); mov ecx, 5; xor edx, edx; int 0x80; pop rbx; ret
INT80_SOCKET_ALG = bytes.fromhex("53 b867010000 bb26000000 b905000000 31d2 cd80 5b c3")
# push rbx; mov eax, 20 (getpid); int 0x80; pop rbx; ret
INT80_GETPID = bytes.fromhex("53 b814000000 cd80 5b c3")


def test_the_32_bit_entry_is_refused_whatever_the_call() -> None:
    out = under_policy(lambda: [_machine_code(INT80_SOCKET_ALG)(), _machine_code(INT80_GETPID)()])
    assert out.report == [-errno.EPERM] * 2
    assert out.refused == [("socket", "i386"), ("getpid", "i386")]


def test_the_floor_closes_the_32_bit_entry_too() -> None:
    def probe() -> int:
        return _machine_code(INT80_GETPID)()

    free = in_child(probe)
    if free.report is None:
        pytest.fail("this kernel has no 32-bit entry: int 0x80 faulted, so nothing was proved")
    assert free.report > 0
    assert under_floor(probe).report == -errno.ENOSYS


def test_x32_numbers_are_refused() -> None:
    out = under_policy(lambda: [raw(bpf.X32_BIT | 39), raw(bpf.X32_BIT | 521)])
    assert out.report == [-errno.EPERM] * 2
    assert out.refused == [("getpid", "x32"), ("ptrace", "x32")]


def test_terminal_injection_is_refused() -> None:
    def probe() -> list[int]:
        _, terminal = os.openpty()
        os.setsid()
        fcntl.ioctl(terminal, 0x540E, 0)  # TIOCSCTTY
        byte = ctypes.create_string_buffer(b"x")
        junk = 1 << 32
        return [call("ioctl", terminal, request, ctypes.addressof(byte)) for request in (0x5412, 0x5412 | junk, 0x541C)]

    out = under_policy(probe)
    assert (out.report, out.refused) == ([-errno.EPERM] * 3, [("ioctl", "x86_64")] * 3)
    assert in_child(probe).report[0] != -errno.EPERM


def test_personality_can_be_asked_but_not_changed() -> None:
    out = under_policy(lambda: [call("personality", 0xFFFFFFFF), call("personality", 0x0040000)])
    assert (out.report, out.refused) == ([0, -errno.EPERM], [("personality", "x86_64")])


def test_user_code_cannot_listen_to_its_own_refusals() -> None:
    """H11, H16: who holds a listener answers "continue" to itself."""
    program = bpf.pack([(0x06, 0, 0, bpf.ALLOW)])

    def probe() -> Any:
        try:
            return seccomp_install._load(program, 8)  # pyright: ignore[reportPrivateUsage]
        except OSError as e:
            return -(e.errno or 0)

    out = under_policy(probe)
    assert (out.report, out.refused) == (-errno.EPERM, [("seccomp", "x86_64")])


def test_user_code_can_still_narrow_itself_with_a_filter_of_its_own() -> None:
    program = bpf.pack([(0x06, 0, 0, bpf.ALLOW)])
    assert under_policy(lambda: seccomp_install.install(program), None).report is None


def test_a_listener_that_leaked_is_useless_inside() -> None:
    """A profile may refuse close(); the descriptor then stays, so its ioctls are refused (M6, H16)."""
    deny_close = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["close"], "action": "SCMP_ACT_ERRNO"}]}
    notification = bytearray(80)

    def probe() -> list[int]:
        leaked = [int(n) for n in os.listdir("/proc/self/fd") if "seccomp notify" in _link(n)]
        at = ctypes.addressof((ctypes.c_char * 80).from_buffer(notification))
        return [len(leaked), *(call("ioctl", leaked[0], request, at) for request in (0xC0502100, 0xC0182101))]

    def _link(n: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{n}")
        except FileNotFoundError:
            return ""

    out = under_policy(probe, deny_close)
    assert out.report == [1, -errno.EPERM, -errno.EPERM]


def test_the_listener_does_not_reach_user_code() -> None:
    def probe() -> list[str]:
        return [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")]

    assert not [link for link in under_policy(probe, None).report if "seccomp" in link]
