"""M16, H9, H15, H16, H21: refused calls and connection attempts are counted by the host, whatever the guest does."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from cell import Outcome, call, confined, fetch, in_child

from fumehood.errors import ProtectionUnavailable, WireError
from fumehood.events import EgressDenied, Event, SyscallRefused
from fumehood.runtime.native import capabilities, notify, peek, seccomp, seccomp_install, syscalls

POLICY, REFUSED = seccomp.compile_policy(None), seccomp.refused_errno(None)
METADATA = [("169.254.169.254", 80), ("fd00:ec2::254", 80), ("8.8.8.8", 53), ("10.0.0.1", 443), ("::ffff:8.8.8.8", 53)]


def in_a_network_where_every_address_answers() -> None:
    """So that a connect that the supervisor lets pass succeeds: the harshest place to prove that it is refused."""
    syscalls.call(syscalls.UNSHARE, syscalls.NEWNET)
    for command in ("link set lo up", "route add local default dev lo", "-6 route add local default dev lo"):
        subprocess.run(["ip", *command.split()], check=True)


def talk(probe: Callable[[], Any], **more: Any) -> Outcome:
    return confined(probe, POLICY, REFUSED, prepare=in_a_network_where_every_address_answers, **more)


def connect(address: str, port: int, kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as s:
        return s.connect_ex((address, port))


@pytest.mark.root
@pytest.mark.parametrize(("address", "port"), METADATA)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_connect_to_anywhere_but_the_loopback_is_refused_and_told(address: str, port: int, protocol: str) -> None:
    kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[protocol]
    out = talk(lambda: connect(address, port, kind))
    assert (out.report, out.attempts) == (errno.ENETUNREACH, [(address, port, protocol)])
    assert out.refused == []


@pytest.mark.root
def test_without_the_inspection_the_same_connect_goes_through() -> None:
    out = talk(lambda: [connect(a, p, socket.SOCK_DGRAM) for a, p in METADATA], egress=True)
    assert (out.report, out.attempts) == ([0] * len(METADATA), [])


def _sendmmsg(s: socket.socket, *to: tuple[str, int]) -> int:
    keep: list[Any] = []
    messages = b""
    for address, port in to:
        name = ctypes.create_string_buffer(struct.pack("=H", 2) + struct.pack("!H4s8x", port, socket.inet_aton(address)))
        keep.append(name)
        messages += struct.pack("=QI4xQQQQi4xI4x", ctypes.addressof(name), 16, 0, 0, 0, 0, 0, 0)
    table = ctypes.create_string_buffer(messages, len(messages))
    return call("sendmmsg", s.fileno(), ctypes.addressof(table), len(to), 0)


@pytest.mark.root
def test_datagrams_with_an_address_are_seen_by_whatever_call_they_go() -> None:
    def probe() -> list[Any]:
        seen: list[Any] = []
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for send in (lambda: s.sendto(b"x", ("8.8.8.8", 53)), lambda: s.sendmsg([b"x"], [], 0, ("8.8.4.4", 53))):
            try:
                seen.append(send())
            except OSError as e:
                seen.append(e.errno)
        return [*seen, _sendmmsg(s, ("127.0.0.1", 9), ("1.1.1.1", 53))]

    out = talk(probe)
    assert out.report == [errno.ENETUNREACH, errno.ENETUNREACH, -errno.ENETUNREACH]
    assert out.attempts == [("8.8.8.8", 53, "udp"), ("8.8.4.4", 53, "udp"), ("1.1.1.1", 53, "udp")]
    assert talk(probe, egress=True).report == [1, 1, 2]


@pytest.mark.root
def test_servers_on_the_loopback_and_unix_sockets_work_and_are_no_attempts() -> None:
    def probe() -> list[Any]:
        got: list[Any] = []
        for family, where in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"), (socket.AF_INET, "0.0.0.0")):
            with socket.socket(family) as server, socket.socket(family) as client:
                server.bind((where, 0))
                server.listen()
                client.connect((where, server.getsockname()[1]))
                client.sendall(b"hi")
                got.append(server.accept()[0].recv(2).decode())
        a, b = socket.socketpair()
        socket.send_fds(a, [b"fd"], [1])
        got.append(len(socket.recv_fds(b, 2, 1)[1]))
        return got

    out = talk(probe)
    assert (out.report, out.events) == (["hi", "hi", "hi", 1], [])


@pytest.mark.root
def test_an_attempt_from_a_thread_and_one_from_a_grandchild_are_told() -> None:
    def probe() -> int:
        thread = threading.Thread(target=connect, args=("9.9.9.9", 443))
        thread.start()
        thread.join()
        if (pid := os.fork()) == 0:
            connect("9.9.9.10", 443)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    assert talk(probe).attempts == [("9.9.9.9", 443, "tcp"), ("9.9.9.10", 443, "tcp")]


@pytest.mark.root
@pytest.mark.parametrize("pointer", [0, 8, (1 << 64) - 4096, (1 << 47) - 8])
def test_an_address_that_cannot_be_read_is_refused_and_counted(pointer: int) -> None:
    def probe() -> list[int]:
        with socket.socket() as s:
            return [call("connect", s.fileno(), pointer, 0xFFFFFFFF), call("sendmsg", s.fileno(), pointer, 0)]

    out = talk(probe)
    assert (out.report, out.attempts) == ([-errno.ENETUNREACH] * 2, [("", 0, "tcp")] * 2)


@pytest.mark.root
def test_a_sockaddr_is_read_within_bounds() -> None:
    big = ctypes.create_string_buffer(b"\x02\x00" + struct.pack("!H", 25) + bytes([9, 9, 9, 9]) + bytes(1 << 20))

    def probe() -> int:
        with socket.socket() as s:
            return call("connect", s.fileno(), ctypes.addressof(big), 1 << 20)

    assert talk(probe).attempts == [("9.9.9.9", 25, "tcp")]
    found = list(peek.destinations("connect", os.getpid(), (0, ctypes.addressof(big), 1 << 40, 0, 0, 0)))
    assert found == [peek.UNREADABLE], "the kernel keeps the low half of a length, so do we: it is 0"


def test_what_a_profile_refuses_is_a_refused_call_and_no_connection_attempt() -> None:
    no_connect = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["connect"], "action": "SCMP_ACT_ERRNO"}]}
    out = confined(lambda: connect("9.9.9.9", 1), seccomp.compile_policy(no_connect), seccomp.refused_errno(no_connect))
    assert (out.report, out.refused, out.attempts) == (errno.EPERM, [("connect", "x86_64")], [])


def test_the_arguments_and_the_pid_of_a_refused_call_are_the_kernels_word() -> None:
    out = confined(lambda: [call("bpf", 1, 2, 3, 4, 5, (1 << 64) - 1), os.getpid()], POLICY, REFUSED)
    (event,) = out.events
    assert event == SyscallRefused("sbxtest", "bpf", "x86_64", (1, 2, 3, 4, 5, (1 << 64) - 1), out.report[1])


def _nothing(number: int, frame: Any) -> None: ...


def test_signals_that_arrive_while_a_call_waits_do_not_count_it_twice() -> None:
    def probe() -> int:
        signal.signal(signal.SIGALRM, _nothing)
        signal.siginterrupt(signal.SIGALRM, False)
        signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
        answers = [call("bpf") for _ in range(300)]
        signal.setitimer(signal.ITIMER_REAL, 0)
        return answers.count(-errno.EPERM)

    out = confined(probe, POLICY, REFUSED)
    assert (out.report, len(out.refused)) == (300, 300)


class Held:
    """A child under the policy that runs `probe`, with its listener in our hands."""

    def __init__(self, probe: Callable[[], Any], refused: Callable[[bytes], int] = REFUSED) -> None:
        ours, theirs = seccomp_install.channel()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                ours.close()
                capabilities.no_new_privs()
                seccomp_install.install_with_listener(POLICY, theirs.detach())
                probe()
                os._exit(0)
            os._exit(7)
        theirs.close()
        self.events: list[Event] = []
        self.fd = fetch(ours)
        self.listener = notify.Listener(self.fd, "sbxtest", refused, self.events.append)
        ours.close()

    def wait_ready(self) -> None:
        assert select.select([self.listener], [], [], 10)[0], "nothing was notified"

    def end(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return os.waitpid(self.pid, 0)[1]


def test_one_turn_takes_a_bounded_number_of_calls_so_a_spammer_waits_for_itself() -> None:
    def spam() -> None:
        for _ in range(8):
            threading.Thread(target=lambda: [call("bpf") for _ in range(10_000)]).start()
        time.sleep(60)

    held = Held(spam)
    try:
        held.wait_ready()
        turns = 0
        while len(held.events) < 50:
            before = len(held.events)
            assert held.listener.handle(max_n=3)
            assert len(held.events) - before <= 3
            turns += 1
        assert turns >= 17
    finally:
        held.end()
        held.listener.close()


def test_handle_never_blocks_and_says_when_the_last_process_is_gone() -> None:
    held = Held(lambda: time.sleep(60))
    held.wait_ready()
    assert held.listener.handle() and held.listener.handle() and held.listener.handle()
    held.end()
    assert held.listener.handle() is False
    assert held.events == []
    held.listener.close()
    held.listener.close()


@pytest.mark.parametrize("probe", [lambda: call("bpf"), lambda: connect("9.9.9.9", 80)], ids=["refused", "connect"])
def test_a_caller_killed_while_it_is_judged_harms_nobody_and_its_pid_is_not_believed(probe: Callable[[], Any]) -> None:
    def kill_then_judge(data: bytes) -> int:
        held.end()
        return REFUSED(data)

    held = Held(probe, kill_then_judge)
    held.wait_ready()
    assert held.listener.handle(max_n=1)  # the rendezvous; a quick child would be judged in the same turn
    held.wait_ready()
    held.listener.handle()
    assert not [e for e in held.events if isinstance(e, EgressDenied)]
    assert held.listener.handle() is False
    held.listener.close()


def test_a_call_that_waits_when_its_process_dies_is_dropped() -> None:
    held = Held(lambda: call("bpf"))
    held.wait_ready()
    held.end()
    assert held.listener.handle() is False
    held.listener.close()


def test_without_its_supervisor_a_process_never_starts() -> None:
    """H13: it waits in the rendezvous, where a kill reaches it, rather than run uncounted."""
    reader, writer = os.pipe()
    held = Held(lambda: os.write(writer, b"ran"))
    held.listener.close()
    os.close(writer)
    assert not select.select([reader], [], [], 0.2)[0]
    assert os.WTERMSIG(held.end()) == signal.SIGKILL
    assert os.read(reader, 3) == b""
    os.close(reader)


def test_when_the_supervisor_dies_refused_calls_stay_refused() -> None:
    reader, writer = os.pipe()

    def probe() -> None:
        os.write(writer, b"r")
        time.sleep(0.05)
        os.write(writer, b"%d" % call("bpf"))

    held = Held(probe)
    held.wait_ready()
    held.listener.handle()
    assert os.read(reader, 1) == b"r"
    held.listener.close()
    assert os.waitstatus_to_exitcode(os.waitpid(held.pid, 0)[1]) == 0
    assert int(os.read(reader, 64)) == -errno.ENOSYS
    os.close(reader)
    os.close(writer)


def test_an_announcement_names_its_sender_by_the_kernels_word_and_anything_else_is_a_wire_error() -> None:
    ours, theirs = seccomp_install.channel()
    with ours, theirs:
        assert notify.read_announcement(ours) is None
        theirs.send(seccomp_install.ANNOUNCEMENT.pack(5))
        assert notify.read_announcement(ours) == (os.getpid(), 5)
        for garbage in (b"", b"abc", b"abcde", bytes(70_000)):
            theirs.send(garbage)
            with pytest.raises(WireError):
                notify.read_announcement(ours)


def test_descriptors_sent_along_with_an_announcement_are_not_kept() -> None:
    ours, theirs = seccomp_install.channel()
    with ours, theirs:
        before = set(os.listdir("/proc/self/fd"))
        with contextlib.suppress(WireError):
            socket.send_fds(theirs, [seccomp_install.ANNOUNCEMENT.pack(5)], [0, 1, 2])
            notify.read_announcement(ours)
        assert set(os.listdir("/proc/self/fd")) == before


def test_only_a_seccomp_listener_is_taken_from_a_process() -> None:
    assert notify.take_listener(os.getpid(), 0) is None
    assert notify.take_listener(os.getpid(), 987) is None
    with pytest.raises(ProcessLookupError):
        notify.take_listener((1 << 22) - 1, 3)


def test_names_of_made_up_calls_cannot_grow_without_bound() -> None:
    from fumehood.runtime.native.libseccomp import name_of

    names = {name_of(arch, n)[0] for arch in (0xC000003E, 0x40000003, 7) for n in range(5000, 9000)}
    assert names == {"unknown"}


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # what exec() gives every ordinary process


@pytest.mark.root
def test_an_ordinary_user_can_supervise_a_process_in_a_user_namespace_of_its_own() -> None:
    def in_own_namespace() -> None:
        syscalls.call(syscalls.UNSHARE, syscalls.NEWUSER | syscalls.NEWPID)
        capabilities.no_new_privs()
        capabilities.drop_all()

    def supervisor() -> Any:
        _become(12345)
        out = confined(lambda: [call("bpf"), connect("9.9.9.9", 80)], POLICY, REFUSED, prepare=in_own_namespace)
        return [out.report, out.refused, out.attempts]

    assert in_child(supervisor).report == [
        [-errno.EPERM, errno.ENETUNREACH],
        [["bpf", "x86_64"]],
        [["9.9.9.9", 80, "tcp"]],
    ]


@pytest.mark.root
def test_another_user_cannot_fetch_the_listener_and_is_told_why() -> None:
    held = Held(lambda: time.sleep(60))

    def stranger() -> str:
        _become(12345)
        try:
            notify.take_listener(held.pid, 3)
        except ProtectionUnavailable as e:
            return e.remediation
        return ""

    assert "CAP_SYS_PTRACE" in in_child(stranger).report
    held.end()
    held.listener.close()
