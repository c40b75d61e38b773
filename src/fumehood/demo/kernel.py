"""Attempts on the kernel's own doors: address families, other ABI entries, namespaces, the calls of H4 and H25."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket

from fumehood.demo.probe import breach, child, denied, held, int80, outcome, refused, syscall


def alg_socket() -> None:
    denied("socket(AF_ALG)", socket.socket, 38, socket.SOCK_SEQPACKET, 0)


def vsock_socket() -> None:
    denied("socket(AF_VSOCK)", socket.socket, 40, socket.SOCK_STREAM, 0)


def netlink_socket() -> None:
    denied("socket(AF_NETLINK, NETFILTER)", socket.socket, 16, socket.SOCK_RAW, 12)
    denied("socket(AF_NETLINK, ROUTE)", socket.socket, 16, socket.SOCK_RAW, 0)


def packet_socket() -> None:
    denied("socket(AF_PACKET)", socket.socket, 17, socket.SOCK_RAW, 0x0300)


def raw_socket() -> None:
    denied("socket(AF_INET, SOCK_RAW)", socket.socket, socket.AF_INET, socket.SOCK_RAW, 1)


def every_other_family() -> None:
    for family in set(range(46)) - {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            if syscall(41, family, kind, 0) == "ok":
                return breach(f"family {family}, type {kind}")
    held("43 families: none")


def int80_socket() -> None:
    # Another architecture, other numbers: 359 is socket(2) there. A filter that knows x86-64 only lets it through.
    def enter() -> None:
        for name, family in (("ALG", 38), ("NETLINK", 16)):
            answer = int80(359, family, 5 - 2 * (family == 16), 0)
            outcome(f"int 0x80 socket(AF_{name})", errno.errorcode[-answer] if answer < 0 else "ok")

    if (end := child(enter)) in ("SIGSYS", "SIGSEGV"):  # killed by the filter, or a kernel without that entry
        held(f"int 0x80 socket: {end}")


def int80_mount() -> None:
    def enter() -> None:
        (held if int80(21, 0, 0, 0) in (-1, -38) else breach)("int 0x80 mount")

    end = child(enter)
    if end in ("SIGSYS", "SIGSEGV"):
        held(f"int 0x80 mount: {end}")


def x32_socket() -> None:
    end = child(lambda: refused("x32 socket(AF_ALG)", 0x40000000 | 41, 38, 5, 0))
    if end == "SIGSYS":
        held("x32 socket(AF_ALG): SIGSYS")


def unshare_user() -> None:
    refused("unshare(NEWUSER)", 272, 0x10000000)


def unshare_others() -> None:
    flags = {"NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000,
             "NEWPID": 0x20000000, "NEWNET": 0x40000000, "NEWTIME": 0x80}  # fmt: skip
    for name, flag in flags.items():
        refused(f"unshare({name})", 272, flag)


def setns_of_init() -> None:
    for kind in ("mnt", "net", "user", "pid"):
        try:
            fd = os.open(f"/proc/1/ns/{kind}", os.O_RDONLY)
        except OSError as e:
            held(f"/proc/1/ns/{kind}: {e.strerror}")
            fd = os.open("/proc/self/ns/user", os.O_RDONLY)
        refused(f"setns({kind})", 308, fd, 0)


def clone_user() -> None:
    # fork()-like clone: a success returns twice, so the whole attempt is a child's.
    def attempt() -> None:
        refused("clone(NEWUSER)", 56, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)

    end = child(attempt)
    if end not in ("ok", "SIGSYS"):
        breach(f"clone(NEWUSER): {end}")


def clone3_user() -> None:
    args = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, signal.SIGCHLD)
    child(lambda: refused("clone3(NEWUSER)", 435, args, ctypes.sizeof(args)))


def io_uring() -> None:
    refused("io_uring_setup", 425, 4, (ctypes.c_char * 256)())


def bpf() -> None:
    attr = (ctypes.c_uint32 * 32)(2, 4, 4, 1)  # BPF_MAP_CREATE of an array
    refused("bpf(MAP_CREATE)", 321, 0, attr, ctypes.sizeof(attr))


def userfaultfd() -> None:
    refused("userfaultfd", 323, 0)
    refused("userfaultfd(USER_MODE_ONLY)", 323, 1)


def perf() -> None:
    attr = (ctypes.c_uint32 * 32)(1, 128)  # PERF_TYPE_SOFTWARE
    refused("perf_event_open", 298, attr, 0, -1, -1, 0)


def keyrings() -> None:
    refused("keyctl(GET_KEYRING_ID)", 250, 0, -3, 1)
    refused("add_key", 248, b"user", b"fumehood", b"x", 1, -3)
    refused("request_key", 249, b"user", b"fumehood-canary", 0, -3)


def read_memory_of_init() -> None:
    class Span(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    buffer = ctypes.create_string_buffer(8)
    local, remote = Span(ctypes.addressof(buffer), 8), Span(0x400000, 8)
    refused("process_vm_readv", 310, 1, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    refused("process_vm_writev", 311, 1, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)


def steal_descriptor() -> None:
    try:
        fd = os.pidfd_open(1)
    except OSError as e:
        held(f"pidfd_open(1): {e.strerror}")
        fd = -1
    refused("pidfd_getfd(1, 0)", 438, fd, 0, 0)


def type_into_terminal() -> None:
    import fcntl
    import pty
    import termios

    def attempt() -> None:
        _, slave = pty.openpty()
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        denied("ioctl(TIOCSTI)", fcntl.ioctl, slave, termios.TIOCSTI, b"x", also=("EIO",))
        # The kernel compares 32 bits; a filter that compares 64 misses this one (snap, CVE-2019-7303).
        answer = syscall(16, slave, termios.TIOCSTI | 1 << 32, ctypes.create_string_buffer(b"x"))
        outcome("ioctl(TIOCSTI | 1<<32)", answer, "EIO")

    if (end := child(attempt)) != "ok":
        held(f"no terminal of one's own: {end}")


def open_by_handle() -> None:
    handle = ctypes.create_string_buffer(b"\x08\0\0\0\x01\0\0\0\x02\0\0\0\0\0\0\0", 32)  # inode 2: the root (shocker.c)
    fd = os.open("/tmp", os.O_RDONLY)
    refused("open_by_handle_at", 304, fd, handle, 0)


def new_kernel() -> None:
    refused("kexec_load", 246, 0, 0, 0, 0)
    refused("kexec_file_load", 320, -1, -1, 0, 0, 0)
    refused("reboot", 169, 0xFEE1DEAD, 672274793, 0, 0)  # CAD_OFF: harmless where it works


def load_module() -> None:
    refused("init_module", 175, b"", 0, b"")
    refused("finit_module", 313, -1, b"", 0)
    refused("delete_module", 176, b"fumehood_no_such_module", 0o4000)


def mount() -> None:
    os.makedirs("/tmp/m", exist_ok=True)
    refused("mount(tmpfs)", 165, b"none", b"/tmp/m", b"tmpfs", 0, 0)
    refused("mount(proc)", 165, b"none", b"/tmp/m", b"proc", 0, 0)
    refused("umount2(/proc)", 166, b"/proc", 2)


def mount_by_new_calls() -> None:
    refused("fsopen(tmpfs)", 430, b"tmpfs", 0)
    refused("open_tree(/, CLONE)", 428, -100, b"/", 1)
    refused("move_mount", 429, -100, b"/home", -100, b"/tmp", 0)
    refused("mount_setattr(/)", 442, -100, b"/", 0, ctypes.create_string_buffer(32), 32)


def pivot() -> None:
    refused("pivot_root", 155, b"/tmp", b"/tmp")


def chroot_breakout() -> None:
    os.makedirs("/tmp/jail", exist_ok=True)
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    refused("chroot", 161, b"/tmp/jail")
    os.fchdir(fd)
    for _ in range(64):
        os.chdir("..")
    (held if os.stat(".").st_ino == os.stat("/").st_ino else breach)("fchdir and 64 x ..: still the same root")


def become_root() -> None:
    for uid in {0, 1000, 65534} - {os.getuid()}:
        denied(f"setresuid({uid})", os.setresuid, uid, uid, uid, also=("EINVAL",))  # EINVAL: no such id in this user ns
    header, all_caps = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    refused("capset(all)", 126, header, all_caps)


def no_privilege_left() -> None:
    with open("/proc/self/status") as f:
        facts = dict(line.rstrip("\n").split(":\t", 1) for line in f if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        (held if int(facts[name], 16) == 0 else breach)(f"{name} {facts[name]}")
    (held if facts["NoNewPrivs"] == "1" else breach)(f"NoNewPrivs {facts['NoNewPrivs']}")
    (held if facts["Seccomp"] == "2" else breach)(f"Seccomp {facts['Seccomp']}")


def set_clock_and_names() -> None:
    import time

    denied("clock_settime", time.clock_settime, time.CLOCK_REALTIME, time.time())
    name = os.uname().nodename.encode()
    refused("sethostname", 170, name, len(name))
    refused("setdomainname", 171, b"x", 1)


def hardware() -> None:
    refused("iopl", 172, 3)
    refused("ioperm", 173, 0x80, 1, 1)
    refused("swapon", 167, b"/tmp/x", 0)
    refused("acct", 163, b"/tmp/x")
    refused("syslog(READ_ALL)", 103, 3, ctypes.create_string_buffer(64), 64)
