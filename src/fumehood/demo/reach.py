"""Attempts to reach something else: the network, other sandboxes, the agent; and to use up the machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

from fumehood.demo.probe import HOST, breach, connects, denied, held, outcome, say, syscall

QUERY = bytes.fromhex("123401000001000000000000076578616d706c6503636f6d0000010001")  # example.com A?


def raw_address() -> None:
    connects("1.1.1.1:443", socket.AF_INET, socket.SOCK_STREAM, ("1.1.1.1", 443))
    connects("2606:4700::1111:443", socket.AF_INET6, socket.SOCK_STREAM, ("2606:4700:4700::1111", 443))
    connects("255.255.255.255", socket.AF_INET, socket.SOCK_DGRAM, ("255.255.255.255", 9))


def dns_udp() -> None:
    for server in ["8.8.8.8", *HOST["resolvers"]]:
        connects(f"{server}:53/udp", socket.AF_INET, socket.SOCK_DGRAM, (server, 53), QUERY)


def dns_tcp() -> None:
    for server in ["8.8.8.8", *HOST["resolvers"]]:
        connects(f"{server}:53/tcp", socket.AF_INET, socket.SOCK_STREAM, (server, 53), QUERY)


def resolve_name() -> None:
    try:
        breach(repr(socket.getaddrinfo("example.com", 443)[0]))
    except socket.gaierror as e:
        held(f"getaddrinfo: {e.strerror}")


def metadata_service() -> None:
    connects("169.254.169.254:80", socket.AF_INET, socket.SOCK_STREAM, ("169.254.169.254", 80))
    connects("fd00:ec2::254:80", socket.AF_INET6, socket.SOCK_STREAM, ("fd00:ec2::254", 80))


def host_addresses() -> None:
    # The host listens on `port` of every address of its own, and answers with its secret.
    for address in ["127.0.0.1", *HOST["addresses"]]:
        connects(f"{address}:{HOST['port']}", socket.AF_INET, socket.SOCK_STREAM, (address, HOST["port"]))
    connects(f"[::1]:{HOST['port']}", socket.AF_INET6, socket.SOCK_STREAM, ("::1", HOST["port"]))
    connects(f"[::ffff:127.0.0.1]:{HOST['port']}", socket.AF_INET6, socket.SOCK_STREAM, ("::ffff:127.0.0.1", HOST["port"]))


def gateway() -> None:
    for address in HOST["gateways"] or ["192.168.0.1"]:
        connects(f"{address}:80", socket.AF_INET, socket.SOCK_STREAM, (address, 80))


def host_unix_sockets() -> None:
    for address in (f"\0{HOST['abstract']}", HOST["unix"], "/run/docker.sock", "/run/dbus/system_bus_socket"):
        connects(repr(address), socket.AF_UNIX, socket.SOCK_STREAM, address)


def leave_traces() -> None:
    """Run in an earlier sandbox that stays alive."""
    for folder in ("/home/user", "/tmp", "/dev/shm", "/var/tmp", "/run"):
        try:
            with open(f"{folder}/trace", "w") as f:
                f.write("left by a neighbour")
        except OSError:
            continue
    threading.Thread(target=lambda: time.sleep(60), name="neighbour", daemon=True).start()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0trace")
    listener.listen()
    globals()["kept"] = listener
    say("seen", f"shmget {syscall(29, 0x7ACE, 4096, 0o1666)}, semget {syscall(64, 0x7ACE, 1, 0o1666)}, "
        f"msgget {syscall(68, 0x7ACE, 0o1666)}, key {syscall(248, b'user', b'trace', b'x', 1, -4)}")  # fmt: skip
    subprocess.Popen(["sleep", "61.25"])
    held("traces left")


def traces_of_a_neighbour() -> None:
    for folder in ("/home/user", "/tmp", "/dev/shm", "/var/tmp", "/run"):
        (breach if os.path.exists(f"{folder}/trace") else held)(f"{folder}/trace")
    connects("abstract socket", socket.AF_UNIX, socket.SOCK_STREAM, "\0trace")
    for name, number, args in (("shmget", 29, (0x7ACE, 0, 0)), ("semget", 64, (0x7ACE, 0, 0)), ("msgget", 68, (0x7ACE, 0))):
        outcome(name, syscall(number, *args), "ENOENT")
    outcome("request_key", syscall(249, b"user", b"trace", 0, -4), "ENOKEY")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            if b"61.25" in f.read():
                breach(f"the neighbour's process is pid {pid}")


def forge_frames() -> None:
    # Frames of docs/wire.md on every descriptor, for every stream: "all is well, the answer is FORGED".
    import json
    import struct

    say("seen", str(os.listdir("/proc/self/fd")))
    event = json.dumps({"type": "result", "is_main_result": True, "data": {"text/plain": "FORGED"}}).encode()
    end = json.dumps({"ok": {"context": "x", "outcome": "ok", "execution_count": 1, "changed": []}}).encode()
    for fd in range(3, 64):
        for stream in range(16):
            for kind, body in ((4, event), (3, event), (5, end)):
                try:
                    os.set_blocking(fd, False)
                    os.write(fd, struct.pack(">IIB", len(body), stream, kind) + body)
                except OSError:
                    break
    say("HELD", "frames written; the host looks whether anyone believed them")


def stop_init() -> None:
    for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV):
        try:
            os.kill(1, number)
        except PermissionError as e:
            held(f"kill(1, {number.name}): {e.strerror}")
    time.sleep(0.2)
    held("pid 1 takes no such signal from its own namespace")


def fork_bomb() -> None:
    forked = 0
    try:
        while forked < 5000:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            forked += 1
        breach(f"{forked} processes")
    except OSError as e:
        held(f"{forked} processes, then {e.strerror}")


def thread_bomb() -> None:
    stop = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(5000):
            thread = threading.Thread(target=stop.wait, daemon=True)
            thread.start()
            threads.append(thread)
        breach(f"{len(threads)} threads")
    except (RuntimeError, MemoryError) as e:
        held(f"{len(threads)} threads, then: {e}")
    stop.set()


def memory_anonymous() -> None:
    hoard: list[bytearray] = []
    for _ in range(64):
        hoard.append(bytearray(b"x") * (16 << 20))
    breach("1 GiB of memory")


def memory_tmpfs() -> None:
    for folder in ("/tmp", "/dev/shm", "/home/user"):
        try:
            with open(f"{folder}/big", "wb") as f:
                for _ in range(4096):
                    f.write(b"x" * (1 << 20))
            breach(f"{folder}: 4 GiB")
        except OSError as e:
            held(f"{folder}: {e.strerror}")


def memory_memfd() -> None:
    fd = os.memfd_create("hoard")
    for _ in range(1024):
        os.write(fd, b"x" * (1 << 20))
    breach("1 GiB in a memfd")


def memory_pipes() -> None:
    import fcntl

    size = 0
    try:
        for _ in range(100_000):
            _, writer = os.pipe()
            os.set_blocking(writer, False)
            fcntl.fcntl(writer, 1031, 1 << 20)  # F_SETPIPE_SZ
            size += os.write(writer, b"x" * (1 << 20))
    except OSError as e:
        return held(f"{size >> 20} MiB in pipes, then {e.strerror}")
    breach(f"{size >> 20} MiB in pipes")


def descriptors() -> None:
    count = 0
    try:
        while count < 200_000:
            os.dup(0)
            count += 1
        breach(f"{count} descriptors")
    except OSError as e:
        held(f"{count} descriptors, then {e.strerror}")


def inodes() -> None:
    count = 0
    try:
        while count < 400_000:
            os.close(os.open(f"/tmp/i{count}", os.O_CREAT | os.O_WRONLY))
            count += 1
        breach(f"{count} files")
    except OSError as e:
        held(f"{count} files, then {e.strerror}")


def output_flood() -> None:
    line = b"no line end, " * 5000
    for _ in range(16_000):  # 1 GiB
        os.write(1, line)
    say("BREACH", "1 GiB of output was taken")


def endless_loop() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


def outlive_the_run() -> None:
    command = [sys.executable, "-c", f"import time; mark = '{HOST['mark']}'; time.sleep(300)"]
    subprocess.Popen(command, start_new_session=True)  # holds our stdout, too
    held("a daemon stays behind; the host looks for it after the end")


def hostile_priority() -> None:
    denied("nice -20", os.setpriority, os.PRIO_PROCESS, 0, -20)
    denied("SCHED_FIFO", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50))
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit + 1, limit + 1))
        breach("RLIMIT_NOFILE raised")
    except (ValueError, OSError):
        held("RLIMIT_NOFILE stays")
