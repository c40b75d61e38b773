"""What PID 1 of a guest does before anything else: file systems, device nodes, the loopback, the kernel's switches.

The root file system is read-only for good. All that can be written lies in one tmpfs with one size: the home, /tmp, /dev/shm.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, BIND = 1, 2, 4, 8, 32, 4096
QUIET = NOSUID | NODEV | NOEXEC
RUN, CGROUP = "/run", "/sys/fs/cgroup"
# What the user can write, below a directory that only root can enter, so that it has no name but the one it is shown under:
# file rules are mounts there, and another name would be a way around them.
_USERS = f"{RUN}/user"
_PLACES = {"home": ("/home/user", 0o755), "tmp": ("/tmp", 0o1777), "shm": ("/dev/shm", 0o1777)}
WRITABLE = tuple(target for target, _ in _PLACES.values())
_NODES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx"}
_CONSOLE = (5, 1)
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
# The guest's kernel is attacked first, so it tells and offers user code less. A kernel without a switch lacks the thing, too.
_SWITCHES = {
    "kernel/dmesg_restrict": "1",
    "kernel/kptr_restrict": "2",
    "kernel/printk": "1",  # the console is a serial port: each byte on it costs an exit to the host
    "kernel/unprivileged_bpf_disabled": "1",
    "kernel/perf_event_paranoid": "3",
    "kernel/yama/ptrace_scope": "0",  # among the user's own processes; PID 1 is root's
    "fs/protected_hardlinks": "1",
    "fs/protected_symlinks": "1",
    "user/max_user_namespaces": "0",
    "vm/unprivileged_userfaultfd": "0",
    "vm/compaction_proactiveness": "0",  # else an idle guest looks twice a second whether its memory is in order
}
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Raises OSError, which names the target."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")


def file_systems(uid: int) -> None:
    """Raises OSError."""
    os.umask(0)
    mount("proc", "/proc", "proc", QUIET)
    mount("dev", "/dev", "tmpfs", NOSUID | NOEXEC, "mode=755,size=64k,nr_inodes=64")
    _devices()
    mount("sysfs", "/sys", "sysfs", QUIET | RDONLY)
    mount("cgroup2", CGROUP, "cgroup2", QUIET)
    mount("run", RUN, "tmpfs", NOSUID | NODEV, "mode=755")
    os.mkdir(_USERS, 0o700)
    for name, (target, mode) in _PLACES.items():
        os.mkdir(f"{_USERS}/{name}", mode)
        os.chown(f"{_USERS}/{name}", uid, uid)
        mount(f"{_USERS}/{name}", target, flags=BIND)
    mount("", "/", flags=REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.umask(0o022)


def _devices() -> None:
    for name, number in _NODES.items():
        os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(*number))
    for name, target in _LINKS.items():
        os.symlink(target, f"/dev/{name}")
    os.mkdir("/dev/shm")
    os.mkdir("/dev/pts")
    mount("devpts", "/dev/pts", "devpts", NOSUID | NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=0")


def console() -> None:
    """As 0-2: the kernel found no /dev/console to open."""
    fd = open_device(*_CONSOLE, os.O_NOCTTY)
    for number in range(3):
        os.dup2(fd, number)
    if fd > 2:
        os.close(fd)


def open_device(major: int, minor: int, flags: int = 0) -> int:
    """Read-write. User code gets no node of it. Raises OSError."""
    path = "/dev/.opening"
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | flags)
    finally:
        os.unlink(path)


def resize_disk(size_bytes: int, inodes: int) -> None:
    """The tmpfs of all that is writable. Raises OSError when it holds more already."""
    mount("run", RUN, "tmpfs", REMOUNT | NOSUID | NODEV, f"mode=755,size={size_bytes},nr_inodes={inodes}")


def loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def switches() -> None:
    for name, value in _SWITCHES.items():
        path = Path("/proc/sys", name)
        if path.exists():
            path.write_text(value)


def command_line() -> dict[str, str]:
    """The `fumehood.NAME=VALUE` words of the kernel's command line."""
    words = Path("/proc/cmdline").read_text().split()
    return dict(w.removeprefix("fumehood.").split("=", 1) for w in words if w.startswith("fumehood.") and "=" in w)


def memory_total_bytes() -> int:
    return int(Path("/proc/meminfo").read_text().split()[1]) << 10
