"""The mounts of one sandbox, made in its own mount namespace over the template's root. Stdlib only.

Everything inherited from the zygote is locked by the kernel (mount_namespaces(7)): it can be neither unmounted nor made
writable from here, whatever capabilities the sandbox's user namespace grants (H6).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import cache

from fumehood.runtime.native import syscalls as sc
from fumehood.runtime.native.root import HOME, SUPPORT, UID, bind

OWN_DIRECTORIES = (HOME, "/tmp", "/dev/shm")
_FLAGS = sc.MS_NOSUID | sc.MS_NODEV
# What of /proc stays: the process directories, what describes only this sandbox, and the files that root.py wrote for it.
_PROC_KEPT = frozenset({"self", "thread-self", "mounts", "net"})
_PROC_OWN = ("cpuinfo", "stat", "version", "uptime", "loadavg", "filesystems", "sys")


def disk(size_bytes: int, inodes: int, shown: Sequence[str] = ()) -> int:
    """One tmpfs for all that the sandbox may write, so that one limit holds for all.

    `shown`: paths of the template below those directories, bound again over it. Returns a descriptor of the tmpfs.
    """
    held = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in shown]
    data = f"size={size_bytes},nr_inodes={inodes},mode=0755,uid={UID},gid={UID}"
    sc.mount("tmpfs", "/tmp", "tmpfs", _FLAGS, data)
    for name, mode in (("home", 0o755), ("shm", 0o1777), ("tmp", 0o1777)):
        os.mkdir(f"/tmp/{name}")
        os.chmod(f"/tmp/{name}", mode)
    fd = os.open("/tmp", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sc.mount("/tmp/home", HOME, flags=sc.MS_BIND)
    sc.mount("/tmp/shm", "/dev/shm", flags=sc.MS_BIND)
    sc.mount("/tmp/tmp", "/tmp", flags=sc.MS_BIND)  # after these two, which it covers
    for path, source in held:
        _show_again(path, source)
    return fd


def _show_again(path: str, source: int) -> None:
    """What the template shows below a directory that now is the sandbox's own, such as a virtual environment in /tmp."""
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))
    sc.mount(f"/proc/self/fd/{source}", path, flags=sc.MS_BIND | sc.MS_REC)
    os.close(source)


@cache
def _proc_masks() -> tuple[tuple[str, str], ...]:
    """(source, target) of every mask: what a newer kernel adds is masked too (H23). Worked out once, in the zygote."""
    names = [n for n in os.listdir("/proc") if not n.isdigit() and n not in _PROC_KEPT and n != "meminfo"]
    return tuple((f"{SUPPORT}/proc/{n}" if n in _PROC_OWN else _nothing(f"/proc/{n}"), f"/proc/{n}") for n in sorted(names))


def prepare() -> None:
    _proc_masks()


def proc(memory_bytes: int) -> None:
    """A /proc of this pid namespace with an allow-list of what is readable."""
    sc.mount("proc", "/proc", "proc", _FLAGS | sc.MS_NOEXEC)
    sc.mount(_meminfo(memory_bytes), "/proc/meminfo", flags=sc.MS_BIND)
    for source, target in _proc_masks():
        sc.mount(source, target, flags=sc.MS_BIND)


def _meminfo(memory_bytes: int) -> str:
    kib = memory_bytes >> 10
    rows = {
        "MemTotal": kib,
        "MemFree": kib,
        "MemAvailable": kib,
        "Buffers": 0,
        "Cached": 0,
        "SwapTotal": 0,
        "SwapFree": 0,
    }
    path = "/dev/shm/.meminfo"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    os.write(fd, "".join(f"{k + ':':<16}{v:>8} kB\n" for k, v in rows.items()).encode())
    os.close(fd)
    return path


def _nothing(path: str) -> str:
    return f"{SUPPORT}/empty" if stat.S_ISDIR(os.stat(path).st_mode) else f"{SUPPORT}/nothing"


def mask(path: str) -> None:
    sc.mount(_nothing(path), path, flags=sc.MS_BIND)


def terminals() -> None:
    # An instance of its own: TIOCSTI or a reopened /dev/pts/N can't reach a terminal of the host.
    # max: the host has 3072 for all but itself (kernel.pty), which one sandbox could take from the others (H15).
    sc.mount("devpts", "/dev/pts", "devpts", sc.MS_NOSUID | sc.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,max=64")


def apply_rules(writable: Sequence[str], read_only: Sequence[str], hidden: Sequence[str]) -> None:
    """The mounts' part of the policy's file rules. Raises OSError for a rule that could not hold: it fails closed (H13)."""
    for path in writable:
        if not os.access(path, os.W_OK):
            raise OSError(f"the policy's writable path {path} is missing or on a read-only mount; add it as a writable mount")
    for path in (*read_only, *hidden):
        if not os.path.exists(path):
            raise OSError(f"the policy names {path}, which is not there when a sandbox starts, so it could be made later")
    for path in read_only:
        bind(path, path)
    for path in hidden:
        mask(path)
