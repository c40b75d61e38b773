"""The table of escape attempts: what is tried, for which hazard, and what should stop it."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fumehood.demo import files, kernel, probe, reach
from fumehood.model import Status

Check = Literal["", "download", "copy_out", "new_context", "neighbour"]  # what the host does after the attempt
_MODULES = (kernel, files, reach)


@dataclass(frozen=True, slots=True)
class Attempt:
    """`barrier` is what should stop it; `ends` the statuses that do, when the host and not the probe has to say so."""

    hazard: str
    name: str
    probe: Callable[[], None]
    barrier: str
    ends: tuple[Status, ...] = ()
    check: Check = ""
    plant: Callable[[], None] | None = None  # run first: in the same sandbox, or in its neighbour if check says so
    env: Mapping[str, str] | None = None
    bare: bool = False  # harmless, and a breach where there is no sandbox: tests show that it can tell

    @property
    def key(self) -> str:
        return self.probe.__name__


_LOADERS = {"PYTHONPATH": "/home/user", "LD_PRELOAD": "/home/user/evil.so", "PYTHONSTARTUP": "/home/user/00.py",
            "LD_LIBRARY_PATH": "/home/user", "BASH_ENV": "/home/user/00.py"}  # fmt: skip
_MEMORY: tuple[Status, ...] = ("oom", "killed", "disk_full")

ATTEMPTS: tuple[Attempt, ...] = (
    Attempt("H4", "AF_ALG socket", kernel.alg_socket, "seccomp: address family"),
    Attempt("H4", "AF_VSOCK socket", kernel.vsock_socket, "seccomp: address family"),
    Attempt("H4", "AF_NETLINK sockets", kernel.netlink_socket, "seccomp: address family", bare=True),
    Attempt("H4", "AF_PACKET socket", kernel.packet_socket, "seccomp: address family", bare=True),
    Attempt("H4", "raw IP socket", kernel.raw_socket, "no capability", bare=True),
    Attempt("H4", "every other address family", kernel.every_other_family, "seccomp: address family", bare=True),
    Attempt("H4", "AF_ALG through int 0x80", kernel.int80_socket, "seccomp: 32-bit entry", bare=True),
    Attempt("H4", "mount through int 0x80", kernel.int80_mount, "seccomp: 32-bit entry"),
    Attempt("H4", "AF_ALG through the x32 ABI", kernel.x32_socket, "seccomp: x32 entry"),
    Attempt("H5", "inherited descriptors", files.inherited_descriptors, "only 0-2 and the context's own"),
    Attempt("H5", "cwd and /proc/self tricks", files.working_directory_tricks, "pivoted root", bare=True),
    Attempt("H6", "remount read-write", files.remount_writable, "seccomp: mount"),
    Attempt("H6", "write through read-only binds", files.write_through, "read-only mount"),
    Attempt("H7", "bytecode, gc walk, raw memory", files.language_jail, "the boundary is the OS"),
    Attempt("H7", "scan memory for host secrets", files.memory_scan, "clean zygote", bare=True),
    Attempt("H8", "sitecustomize, .pth, startup files", files.started_before_the_filter, "filter first, guest later",
            check="new_context", plant=files.plant_startup_code),
    Attempt("H8", "LD_PRELOAD and friends by env", files.started_before_the_filter, "filter first, guest later",
            check="new_context", plant=files.plant_startup_code, env=_LOADERS),
    Attempt("H9", "raw address", reach.raw_address, "no route"),
    Attempt("H9", "DNS over UDP", reach.dns_udp, "no route"),
    Attempt("H9", "DNS over TCP", reach.dns_tcp, "no route"),
    Attempt("H9", "resolve a name", reach.resolve_name, "no route"),
    Attempt("H9", "cloud metadata service", reach.metadata_service, "no route"),
    Attempt("H9", "the host's own addresses", reach.host_addresses, "network namespace", bare=True),
    Attempt("H9", "the gateway", reach.gateway, "no route"),
    Attempt("H9", "the host's Unix sockets", reach.host_unix_sockets, "network namespace, own root", bare=True),
    Attempt("H12", "links to secrets, then download", files.link_to_secrets, "file work happens inside", check="download"),
    Attempt("H12", "fifo, 1 TiB sparse, odd names out", files.fifo_and_sparse, "plain files under DIR", check="copy_out"),
    Attempt("H12", "device nodes", files.make_devices, "no capability"),
    Attempt("H15", "fork bomb", reach.fork_bomb, "cgroup: pids", ends=("pids_limit",)),
    Attempt("H15", "thread bomb", reach.thread_bomb, "cgroup: pids", ends=("pids_limit",)),
    Attempt("H15", "memory: anonymous", reach.memory_anonymous, "cgroup: memory", ends=_MEMORY),
    Attempt("H15", "memory: tmpfs", reach.memory_tmpfs, "tmpfs size", ends=_MEMORY),
    # Where only a watchdog counts memory, which does not see a memfd's, memfd_create itself is refused.
    Attempt("H15", "memory: memfd", reach.memory_memfd, "cgroup: memory", ends=(*_MEMORY, "syscall_refused")),
    Attempt("H15", "memory: pipes", reach.memory_pipes, "cgroup: memory", ends=_MEMORY),
    Attempt("H15", "descriptors", reach.descriptors, "rlimit"),
    Attempt("H15", "inodes", reach.inodes, "tmpfs inodes", ends=("disk_full",)),
    Attempt("H15", "1 GiB of output, no line end", reach.output_flood, "output cap", ends=("output_limit",)),
    Attempt("H15", "endless loop that ignores signals", reach.endless_loop, "server deadline", ends=("timeout",)),
    Attempt("H15", "stop and kill pid 1", reach.stop_init, "pid namespace", ends=("killed",)),
    Attempt("H15", "a daemon that outlives the run", reach.outlive_the_run, "pid namespace"),
    Attempt("H15", "raise priority and limits", reach.hostile_priority, "no capability"),
    Attempt("H16", "forged frames on every descriptor", reach.forge_frames, "host facts come from the host",
            check="neighbour", ends=("killed", "error")),
    Attempt("H16", "trace and write pid 1", files.attack_init_memory, "seccomp: ptrace; not dumpable"),
    Attempt("H16", "poison the interpreter", files.poison_interpreter, "read-only mount", check="neighbour"),
    Attempt("H23", "kernel memory and symbols", files.kernel_memory, "masked /proc"),
    Attempt("H23", "write /proc knobs", files.write_proc, "read-only /proc"),
    Attempt("H23", "/sys", files.sysfs, "no /sys"),
    Attempt("H23", "cgroup release agent", files.cgroup_escape, "no cgroup mount"),
    Attempt("H23", "host name, pids and command lines", files.host_facts, "uts and pid namespaces", bare=True),
    Attempt("H23", "host secrets and keys", files.host_secrets, "own root", bare=True),
    Attempt("H24", "what a neighbour left", reach.traces_of_a_neighbour, "own mounts, ipc, net, pids",
            check="neighbour", plant=reach.leave_traces),
    Attempt("H25", "unshare a user namespace", kernel.unshare_user, "seccomp: unshare", bare=True),
    Attempt("H25", "unshare every other namespace", kernel.unshare_others, "seccomp: unshare", bare=True),
    Attempt("H25", "setns", kernel.setns_of_init, "seccomp: setns"),
    Attempt("H25", "clone a user namespace", kernel.clone_user, "seccomp: clone flags", bare=True),
    Attempt("H25", "clone3 a user namespace", kernel.clone3_user, "seccomp: clone3", bare=True),
    Attempt("H25", "io_uring", kernel.io_uring, "seccomp", bare=True),
    Attempt("H25", "bpf", kernel.bpf, "seccomp", bare=True),
    Attempt("H25", "userfaultfd", kernel.userfaultfd, "seccomp", bare=True),
    Attempt("H25", "perf_event_open", kernel.perf, "seccomp", bare=True),
    Attempt("H25", "keyrings", kernel.keyrings, "seccomp", bare=True),
    Attempt("H25", "process_vm_readv of pid 1", kernel.read_memory_of_init, "seccomp"),
    Attempt("H25", "pidfd_getfd", kernel.steal_descriptor, "seccomp"),
    Attempt("H25", "TIOCSTI", kernel.type_into_terminal, "seccomp"),
    Attempt("H25", "open_by_handle_at", kernel.open_by_handle, "seccomp, no capability", bare=True),
    Attempt("H25", "kexec and reboot", kernel.new_kernel, "seccomp, no capability"),
    Attempt("H25", "kernel modules", kernel.load_module, "seccomp, no capability"),
    Attempt("H25", "mount and umount", kernel.mount, "seccomp"),
    Attempt("H25", "the new mount calls", kernel.mount_by_new_calls, "seccomp"),
    Attempt("H25", "pivot_root", kernel.pivot, "seccomp"),
    Attempt("H25", "chroot, fchdir, ..", kernel.chroot_breakout, "seccomp, no capability", bare=True),
    Attempt("H25", "become root, raise capabilities", kernel.become_root, "no new privileges", bare=True),
    Attempt("H25", "privileges left", kernel.no_privilege_left, "no capability", bare=True),
    Attempt("H25", "clock, host and domain name", kernel.set_clock_and_names, "no capability"),
    Attempt("H25", "I/O ports, swap, accounting, kernel log", kernel.hardware, "seccomp, no capability"),
)  # fmt: skip


def program(act: Callable[[], None], host: Mapping[str, Any]) -> str:
    """The whole guest program: public host facts, the probe's vocabulary, the attempt, its call."""
    module = next(m for m in _MODULES if m.__name__ == act.__module__)
    return "\n".join(
        (
            f"import json\nHOST = json.loads({json.dumps(json.dumps(dict(host)))})",
            inspect.getsource(probe),
            _constants(module),
            inspect.getsource(act),
            f"{act.__name__}()",
        )
    )


def _constants(module: Any) -> str:
    """The module's plain imports and constants: what an attempt may name besides the probe's vocabulary."""
    tree = ast.parse(inspect.getsource(module))
    kept = [n for n in tree.body if isinstance(n, ast.Import | ast.Assign)]
    return "\n".join(ast.unparse(n) for n in kept)
