"""The root file system of a template, built once by its zygote in a mount namespace of its own. Stdlib only.

A tmpfs holds only mount points and small synthesised files; everything else is bound into it read-only, nosuid, nodev,
from the host's Python environment or from an unpacked image. Nothing of the host's /etc, /home, /var, /run is in it.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fumehood.runtime.native import syscalls as sc

USER, UID, HOME = "user", 1000, "/home/user"
SUPPORT = "/.fumehood"  # the agent's code, empty things to mask with, synthesised /proc files
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_ETC_FROM_HOST = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "fonts", "ssl/certs", "mime.types")
_RESERVED = frozenset({"proc", "sys", "dev", "tmp", "home", "run", "root", "mnt", "media", "boot", "lost+found", ".fumehood"})

_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_ETC = {
    "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\n{USER}:x:{UID}:{UID}::{HOME}:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\n{USER}:x:{UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    # An address of documentation (RFC 5737), never reached: a look-up is seen and counted as the attempt it is (H9, M16).
    # Without a name server glibc asks the loopback, which is the sandbox's own.
    "resolv.conf": "nameserver 192.0.2.53\noptions attempts:1\n",
    "localtime": "",
}


class _MountAttr(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint64) for n in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def _restrict(target: str, *, writable: bool) -> None:
    """Recursive, unlike a bind remount, which leaves the submounts writable (H6). Linux 5.12.

    nosuid and nodev always: a `writable` mount above all must not hold what a set-user-ID bit or a node would open.
    """
    attr = _MountAttr(attr_set=_ATTR_NOSUID | _ATTR_NODEV | (0 if writable else _ATTR_RDONLY))
    sc.call(sc.MOUNT_SETATTR, _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attr, ctypes.sizeof(attr))


def bind(source: str, target: str, *, writable: bool = False) -> None:
    sc.mount(source, target, flags=sc.MS_BIND | sc.MS_REC)
    _restrict(target, writable=writable)


def _host_entries(prefixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """/usr, the merged-usr links or directories, and the interpreter's own prefixes where they lie elsewhere."""
    for top in ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.lexists(f"/{top}"):
            yield f"/{top}", f"/{top}"
    for prefix in prefixes:
        if not prefix.startswith("/usr/") and prefix != "/usr":
            yield prefix, prefix
    for name in _ETC_FROM_HOST:
        if Path(f"/etc/{name}").exists():
            yield f"/etc/{name}", f"/etc/{name}"


def _image_entries(image: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(os.listdir(image)):
        if entry not in _RESERVED:
            yield f"{image}/{entry}", f"/{entry}"


def _place(root: str, source: str, target: str, *, writable: bool = False) -> None:
    """Show `source` at `target` below the new root. A link stays a link: it must resolve inside, never on the host."""
    at = root + target
    mode = os.lstat(source).st_mode
    if stat.S_ISLNK(mode) and target.count("/") == 1:
        os.symlink(os.readlink(source), at)
        return
    if os.path.lexists(at):
        return  # a prefix inside another prefix is there already
    if stat.S_ISDIR(os.stat(source).st_mode):
        os.makedirs(at, 0o755)
    else:
        os.makedirs(os.path.dirname(at), 0o755, exist_ok=True)
        Path(at).touch(0o644)
    bind(source, at, writable=writable)


def _devices(root: str) -> None:
    for name in _DEVICES:
        Path(f"{root}/dev/{name}").touch()
        sc.mount(f"/dev/{name}", f"{root}/dev/{name}", flags=sc.MS_BIND)
        # Read-only is for the host's inode, whose times anybody may set; a device itself is written to all the same.
        sc.mount("none", f"{root}/dev/{name}", flags=sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NOEXEC)
    for name, to in {
        "fd": "/proc/self/fd",
        "stdin": "fd/0",
        "stdout": "fd/1",
        "stderr": "fd/2",
        "ptmx": "pts/ptmx",
    }.items():
        os.symlink(f"/proc/self/{to}" if to.startswith("fd/") else to, f"{root}/dev/{name}")


def _synthesise(root: str, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        os.makedirs(os.path.dirname(root + path), 0o755, exist_ok=True)
        Path(root + path).write_text(text)
        os.chmod(root + path, 0o444)


def proc_files() -> dict[str, str]:
    """What stands in for /proc files that programs read. Host facts stay out (H23): no names, boot times, devices, mounts."""
    cpus = os.cpu_count() or 1
    one = [ln for ln in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if _cpu_line(ln)]
    block = "\n".join(f"{ln}" for ln in one)
    return {
        f"{SUPPORT}/proc/cpuinfo": "".join(f"processor\t: {n}\n{block}\n\n" for n in range(cpus)),
        f"{SUPPORT}/proc/stat": "cpu  0 0 0 0 0 0 0 0 0 0\n" + "".join(f"cpu{n} 0 0 0 0 0 0 0 0 0 0\n" for n in range(cpus)),
        f"{SUPPORT}/proc/version": f"Linux version {os.uname().release}\n",
        f"{SUPPORT}/proc/uptime": "1.00 1.00\n",
        f"{SUPPORT}/proc/loadavg": "0.00 0.00 0.00 1/1 1\n",
        f"{SUPPORT}/proc/filesystems": "nodev\ttmpfs\nnodev\tproc\n",
        f"{SUPPORT}/proc/sys/kernel/cap_last_cap": Path("/proc/sys/kernel/cap_last_cap").read_text(),
        f"{SUPPORT}/proc/sys/kernel/ngroups_max": "65536\n",
        f"{SUPPORT}/proc/sys/kernel/osrelease": f"{os.uname().release}\n",
        f"{SUPPORT}/proc/sys/kernel/ostype": "Linux\n",
        f"{SUPPORT}/proc/sys/kernel/pid_max": "32768\n",
        f"{SUPPORT}/proc/sys/vm/overcommit_memory": "0\n",
    }


def _cpu_line(line: str) -> bool:
    return line.split("\t")[0].strip() in (
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "flags",
        "cache size",
        "address sizes",
    )


def build(scratch: str, package: str, template: Mapping[str, Any], prefixes: Sequence[str]) -> None:
    """The ordered recipe. Caller: already in fresh user (rootless), mount and pid namespaces, as PID 1 of the last.

    `scratch` is any empty host directory; `package` is the fumehood package's directory; `template` the Template as a dict.
    Afterwards `/` is the template's root, read-only, and no path leads back.
    """
    sc.mount("none", "/", flags=sc.MS_REC | sc.MS_PRIVATE)  # nothing below may propagate to the host
    sc.mount("tmpfs", scratch, "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=0755,size=4m,nr_inodes=4k")
    for d in (
        "proc",
        "sys",
        "dev/pts",
        "dev/shm",
        "tmp",
        "run",
        "root",
        "etc",
        f"{HOME[1:]}",
        "var",
        f"{SUPPORT[1:]}/empty",
    ):
        os.makedirs(f"{scratch}/{d}", 0o755, exist_ok=True)
    # For what libraries write while they are preloaded (matplotlib's font list); every sandbox mounts its own over it.
    # Before the binds: a virtual environment may lie below /tmp.
    sc.mount("tmpfs", f"{scratch}/tmp", "tmpfs", sc.MS_NOSUID | sc.MS_NODEV, "mode=1777,size=64m,nr_inodes=4k")
    image = template["root"]
    if image is None:
        _synthesise(scratch, {f"/etc/{k}": v for k, v in _ETC.items()})
    else:
        os.rmdir(f"{scratch}/etc")
        os.rmdir(f"{scratch}/var")
    for source, target in _host_entries(prefixes) if image is None else _image_entries(image):
        _place(scratch, source, target)
    for m in template["mounts"]:
        _place(scratch, m["source"], m["target"], writable=m["writable"])
    if image is None:
        os.symlink("/tmp", f"{scratch}/var/tmp")
    _place(scratch, package, f"{SUPPORT}/lib/fumehood")
    _synthesise(scratch, proc_files() | {f"{SUPPORT}/nothing": ""})
    _devices(scratch)
    # The kernel lets a later user namespace mount its own /proc only where a fully visible one exists (mount_too_revealing).
    sc.mount("proc", f"{scratch}/proc", "proc", sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
    # pivot_root(".", ".") stacks the old root on the new one; detaching it needs no directory of its own (pivot_root(2)).
    os.chdir(scratch)
    sc.call(sc.PIVOT_ROOT, b".", b".")
    sc.umount(".")
    os.chdir("/")
    sc.mount("none", "/", flags=sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV)
