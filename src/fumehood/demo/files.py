"""Attempts by way of files: read-only mounts, descriptors, planted code, links, devices, /proc and /sys."""

from __future__ import annotations

import ctypes
import errno
import gc
import glob
import os
import re
import stat
import sys

from fumehood.demo.probe import CANARY, HOST, breach, denied, held, outcome, refused, say, syscall, unreadable


def host_secrets() -> None:
    unreadable("/etc/shadow", "/etc/gshadow", "/root/.ssh/id_rsa", "/root/.ssh/id_ed25519", "/root/.bash_history",
               "/root/.aws/credentials", "/var/run/docker.sock", "/run/secrets", HOST["canary_file"])  # fmt: skip
    for found in glob.glob("/home/*/.ssh/*") + glob.glob("/root/.*") + glob.glob("/proc/[0-9]*/root/root/.*"):
        interpreter = re.sub(r"^/proc/\d+/root", "", found) in sys.base_prefix  # the runtime itself is shown, read-only
        (held if interpreter else breach)(found)


def inherited_descriptors() -> None:
    import socket
    import struct

    for name in os.listdir("/proc/self/fd"):
        try:
            mode, target = os.fstat(int(name)).st_mode, os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        own = target.startswith(("/home/user/", "/tmp/", "/memfd:", "/dev/shm/"))
        if stat.S_ISDIR(mode) or stat.S_ISBLK(mode) or (stat.S_ISREG(mode) and not own):
            breach(f"fd {name}: {target}")
        elif stat.S_ISSOCK(mode):
            with socket.socket(fileno=os.dup(int(name))) as s:
                pid = struct.unpack("3i", s.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            # Peer 0 = a process that this pid namespace cannot name: the host's side of something.
            (held if pid else breach)(f"fd {name}: a socket whose peer is {pid}")
        else:
            held(f"fd {name}: {target}")


def working_directory_tricks() -> None:
    root = os.stat("/")
    ways = ["/proc/self/cwd/../../../../../..", "/proc/self/root/..", "/proc/self/fd/../cwd/../../.."]
    ways += [f"/proc/self/fd/{n}/../../../../.." for n in range(3, 64)] + [f"/proc/1/{w}" for w in ("root/..", "cwd")]
    for way in ways:
        try:
            with open(f"{way}/{HOST['canary_file']}", "rb") as f:
                breach(f"{way}: {f.read()!r}")
            continue
        except OSError:
            pass
        try:
            here = os.stat(way)
        except OSError:
            continue
        if way.endswith("..") and (here.st_dev, here.st_ino) != (root.st_dev, root.st_ino):
            say("seen", way)
    held("no way leads to the host's file")


def remount_writable() -> None:
    for path in ("/", "/usr", "/proc", "/etc", os.path.dirname(os.__file__)):
        refused(f"mount({path}, remount,rw)", 165, b"none", path.encode(), b"", 32, 0)
        refused(f"mount({path}, remount,bind,rw)", 165, b"none", path.encode(), b"", 32 | 4096, 0)


def write_through() -> None:
    read_only = ("EROFS", "EACCES", "EPERM", "ENOENT")
    for path in (os.__file__, "/etc/passwd", "/etc/hosts", "/usr/bin/env", "/etc/ld.so.preload", "/fumehood-breach"):
        denied(f"write {path}", os.open, path, os.O_WRONLY | os.O_CREAT, 0o644, also=read_only)
        denied(f"chmod {path}", os.chmod, path, 0o777, also=read_only)


def poison_interpreter() -> None:
    for path in (os.path.realpath(sys.executable), os.__file__, re.__file__, "/proc/self/exe"):
        denied(f"write {path}", os.open, path, os.O_RDWR, also=("ETXTBSY", "ENOENT"))
    folder = os.path.dirname(os.__file__)
    denied(f"create in {folder}", os.mkdir, f"{folder}/fumehood_breach")
    denied(f"unlink {os.__file__}", os.unlink, os.__file__)
    for folder in sys.path:
        if os.path.isabs(folder) and os.path.isdir(folder) and not folder.startswith(("/home/user", "/tmp")):
            denied(f"create in {folder}", os.mkdir, f"{folder}/fumehood_breach")


def language_jail() -> None:
    # No language-level jail is claimed (H7): all of this works, and none of it matters.
    import types

    ran: list[int] = []
    code = (lambda: ran.append(1)).__code__
    types.FunctionType(code.replace(co_name="forged"), {"ran": ran}, closure=(types.CellType(ran),))()
    number = ctypes.c_long.from_address(id(10**6 + 7) + 24)  # straight into an object's memory
    say("seen", f"bytecode ran {len(ran)} time, memory {number.value}, {len(gc.get_objects())} objects")
    for cls in object.__subclasses__():
        if cls.__name__ == "Popen" or "Supervisor" in cls.__name__:
            say("seen", cls.__name__)
    for thing in gc.get_objects():
        if isinstance(thing, str | bytes) and re.search(CANARY, thing if isinstance(thing, bytes) else thing.encode()):
            say("found", repr(thing))  # judged by the host
    held("any bytecode and any memory of one's own process; the host's secret is not among it")


def memory_scan() -> None:
    # Secrets that a forked zygote may have left in pages that this process shares with it.
    scanned = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            if " r" not in line[:40] or "[v" in line or high - low > 1 << 28:
                continue
            try:
                memory.seek(low)
                data = memory.read(high - low)
            except (OSError, ValueError, OverflowError):
                continue
            scanned += len(data)
            for match in re.finditer(CANARY, data):
                say("found", match[0].decode())
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as f:
                say("found", repr(re.findall(CANARY, f.read())))
        except OSError as e:
            held(f"{path}: {e.strerror}")
    (held if scanned > 1 << 20 else breach)(f"{scanned >> 20} MiB of memory scanned")


def plant_startup_code() -> None:
    note = (
        "import os\nopen('/home/user/ran','a').write(f'{os.getpid()} {os.getuid()} '"
        "+open('/proc/self/status').read().split('Seccomp:')[1].split()[0]+'\\n')\n"
    )
    site = f"/home/user/.local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    places = ("/home/user", "/tmp", site, "/home/user/.ipython/profile_default/startup",
              "/home/user/.config/ipython/profile_default/startup")  # fmt: skip
    for folder in places:
        os.makedirs(folder, exist_ok=True)
        for name in ("sitecustomize.py", "usercustomize.py", "00.py", "ctypes.py", "socket.py"):
            with open(f"{folder}/{name}", "w") as f:
                f.write(note)
        with open(f"{folder}/x.pth", "w") as f:
            f.write("import sitecustomize\n")
    with open("/home/user/evil.so", "wb") as f:
        f.write(b"\x7fELF")
    held("planted")


def started_before_the_filter() -> None:
    # Planted code may run in the user's own programs; never as pid 1, another uid, or before the filter (H8).
    import subprocess

    subprocess.run([sys.executable, "-c", ""], env={"PYTHONPATH": "/home/user", "HOME": "/home/user"}, check=False)
    with open("/home/user/ran") as f:
        lines = f.read().split("\n")[:-1]
    for line in lines:
        pid, uid, seccomp = line.split()
        good = pid != "1" and int(uid) == os.getuid() and seccomp == "2"
        (held if good else breach)(f"planted code ran as pid {pid}, uid {uid}, seccomp {seccomp}")


def link_to_secrets() -> None:
    for name, target in (("loot", HOST["canary_file"]), ("shadow", "/etc/shadow"), ("magic", "/proc/1/root")):
        os.symlink(target, f"/home/user/{name}")
    os.symlink(os.path.dirname(HOST["canary_file"]), "/home/user/folder")
    held("links planted")


def fifo_and_sparse() -> None:
    os.mkfifo("/home/user/pipe")
    with open("/home/user/sparse", "wb") as f:
        f.truncate(1 << 40)
    for name in (b"/home/user/new\nline\x1b[2J", b"/home/user/not-utf8-\xff", b"/home/user/.envrc"):
        with open(name, "wb") as f:
            f.write(b"touch /tmp/fumehood-breach")
    held("planted")


def make_devices() -> None:
    for name, kind, numbers in (("mem", stat.S_IFCHR, (1, 1)), ("disk", stat.S_IFBLK, (8, 0)), ("kmsg", stat.S_IFCHR, (1, 11))):
        denied(f"mknod {name}", os.mknod, f"/tmp/{name}", kind | 0o666, os.makedev(*numbers))
    for device in glob.glob("/dev/*"):
        mode = os.lstat(device).st_mode
        if stat.S_ISBLK(mode):
            breach(device)
    unreadable("/dev/mem", "/dev/kmem", "/dev/port", "/dev/kmsg", "/dev/kvm", "/dev/fuse", "/dev/sda", "/dev/vda")


def kernel_memory() -> None:
    unreadable("/proc/kcore", "/proc/kmsg", "/proc/vmcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug",
               "/proc/cmdline", "/proc/modules", "/proc/partitions", "/proc/config.gz", "/proc/iomem")  # fmt: skip
    try:
        with open("/proc/kallsyms") as f:
            addresses = {line.split()[0].strip("0") for line in f}
    except OSError as e:
        return held(f"/proc/kallsyms: {errno.errorcode.get(e.errno or 0)}")
    (breach if addresses - {""} else held)(f"/proc/kallsyms: {len(addresses - {''})} addresses")


def write_proc() -> None:
    also = ("ENOENT", "EROFS")
    for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
                 "/proc/sys/vm/drop_caches", "/proc/sys/kernel/hostname", "/proc/sys/vm/overcommit_memory",
                 "/proc/sys/fs/binfmt_misc/register", "/proc/irq/0/smp_affinity", "/proc/1/oom_score_adj",
                 "/proc/acpi/wakeup", "/proc/mtrr"):  # fmt: skip
        denied(f"write {path}", os.open, path, os.O_WRONLY, also=also)


def sysfs() -> None:
    for folder in ("/sys/kernel/debug", "/sys/kernel/security", "/sys/firmware", "/sys/fs/cgroup", "/sys/kernel/tracing"):
        try:
            (breach if os.listdir(folder) else held)(f"{folder}: listed")
        except OSError as e:
            held(f"{folder}: {errno.errorcode.get(e.errno or 0)}")
    for path in ("/sys/kernel/uevent_helper", "/sys/power/state", "/sys/fs/cgroup/release_agent"):
        denied(f"write {path}", os.open, path, os.O_WRONLY, also=("ENOENT", "EROFS"))


def cgroup_escape() -> None:
    refused("mount(cgroup)", 165, b"none", b"/tmp", b"cgroup", 0, b"memory")
    for path in glob.glob("/sys/fs/cgroup/**/*.procs", recursive=True)[:8]:
        denied(f"write {path}", os.open, path, os.O_WRONLY, also=("EROFS",))


def host_facts() -> None:
    (breach if os.uname().nodename == HOST["hostname"] else held)(f"hostname {os.uname().nodename}")
    pids = [int(p) for p in os.listdir("/proc") if p.isdigit()]
    (breach if len(pids) > 32 else held)(f"{len(pids)} processes visible")
    if HOST["pid"] > 64:  # a smaller one may be a process of this sandbox, too
        outcome(f"kill({HOST['pid']}, 0)", syscall(62, HOST["pid"], 0), "ESRCH")
    for pid in pids:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            if HOST["decoy"].encode() in f.read():
                breach(f"pid {pid} is the host's")


def attack_init_memory() -> None:
    refused("ptrace(ATTACH, 1)", 101, 16, 1, 0, 0)
    refused("ptrace(SEIZE, 1)", 101, 0x4206, 1, 0, 0)
    for path in ("/proc/1/mem", "/proc/1/environ", "/proc/1/syscall", "/proc/1/fd/0", "/proc/1/fd/3"):
        denied(f"open {path}", os.open, path, os.O_RDWR, also=("ENOENT", "ENXIO"))
