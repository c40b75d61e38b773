"""For each barrier an attack that fails with it and gets further without it.

Where two barriers stop the same attack, the others are taken away in both runs, so that the difference is the one.
"""

import os
import socket
from pathlib import Path

import pytest
from attack import FILTERS, INSIDE, PRELUDE, native, opened, switched, template, words

from fumehood import Sandbox
from fumehood.errors import SetupFailed
from fumehood.model import MIB, Mount
from fumehood.runtime.host import accounting
from fumehood.runtime.native import landlock
from fumehood.runtime.native import syscalls as sc

pytestmark = pytest.mark.rootless


def test_a_read_only_bind_alone_stops_writes_through_it_and_remounts(shared: Path) -> None:
    """H6: neither ownership nor Landlock nor seccomp nor the lack of capabilities is in the way here."""
    without = ("landlock", "capabilities", *FILTERS)
    attack = (
        f"attempt(write, '{INSIDE}/file'); attempt(write, '{INSIDE}/new')\n"
        f"attempt(syscall, 165, b'', b'{INSIDE}', b'', 0x1020, 0)  # MS_REMOUNT|MS_BIND without MS_RDONLY\n"
        f"attempt(syscall, 166, b'{INSIDE}', 2)  # detach it\n"
        f"attempt(write, '{INSIDE}/file')"
    )
    with template("bound", Mount(str(shared), INSIDE)) as t, opened(without, template=t) as box:
        assert words(box, attack) == ["EROFS", "EROFS", "EPERM", "EINVAL", "EROFS"]
    assert (shared / "file").read_text() == "host" and os.listdir(shared) == ["file"]
    with template("loose", Mount(str(shared), INSIDE, writable=True)) as t, opened(without, template=t) as box:
        assert words(box, attack)[:2] == ["through", "through"]
    assert (shared / "file").read_text() == "x"


def test_the_root_itself_is_a_read_only_mount_that_cannot_be_made_writable() -> None:
    """H6: for root and for a user, with every other barrier gone."""
    code = (
        "for p in ('/x', '/usr/x', '/etc/passwd', '/.fumehood/x'): attempt(write, p)\n"
        "attempt(syscall, 165, b'', b'/', b'', 0x1020, 0); attempt(write, '/x')"
    )
    with opened(("landlock", "capabilities", *FILTERS)) as box:
        assert set(words(box, code)) <= {"EROFS", "EPERM", "EACCES"}


def test_landlock_alone_stops_a_write_outside_the_writable_paths(shared: Path) -> None:
    """H6, H12: a mount that is writable by mistake. Truncation without opening is known to Landlock since Linux 6.2."""
    attack = f"attempt(write, '{INSIDE}/file'); attempt(os.mkdir, '{INSIDE}/d'); attempt(os.truncate, '{INSIDE}/file', 0)"
    with template("mistake", Mount(str(shared), INSIDE, writable=True)) as t:
        with opened(FILTERS, template=t) as box:
            assert words(box, attack) == ["EACCES", "EACCES", "EACCES" if landlock.abi() >= 3 else "through"]
        with opened(("landlock", *FILTERS), template=t) as box:
            assert words(box, attack) == ["through"] * 3


UNSHARE_USER = "attempt(syscall, 272, 0x10000000)"
KEYRING = "attempt(syscall, 250, 0, -3, 1)  # KEYCTL_GET_KEYRING_ID, the session's, made if there is none"


@pytest.mark.parametrize("attack", [UNSHARE_USER, KEYRING], ids=["unshare", "keyctl"])
def test_the_policy_filter_alone_refuses_and_counts(attack: str) -> None:
    """H25"""
    with opened(("seccomp-floor",)) as box:
        result = box.run(PRELUDE + attack)
        assert result.stdout == "EPERM\n" and sum(r.count for r in result.refused_syscalls) == 1


@pytest.mark.parametrize("attack", [UNSHARE_USER, KEYRING], ids=["unshare", "keyctl"])
def test_the_floor_filter_alone_refuses(attack: str) -> None:
    """H25: what would protect the agent, and user code if its own filter had a hole."""
    with opened(("seccomp-policy",)) as box:
        assert words(box, attack) == ["ENOSYS"]
    with opened(FILTERS) as box:
        assert words(box, attack) == ["through"]


def test_empty_capabilities_alone_stop_what_the_user_namespace_would_grant() -> None:
    """M5: its own host name is the harmless example of a privileged act."""
    attack = "attempt(socket.sethostname, 'x'); attempt(os.chroot, '/tmp')"
    with opened(FILTERS) as box:
        assert words(box, attack) == ["EPERM", "EPERM"]
    with opened(("capabilities", *FILTERS)) as box:
        assert words(box, attack) == ["through", "through"]


def test_without_no_new_privs_nothing_starts() -> None:
    """H13: Landlock and seccomp can't be installed without it, so its loss fails closed."""
    with pytest.raises(SetupFailed, match=r"capabilities|landlock"), opened(("no-new-privs",)):
        pass
    with opened() as box:
        assert words(box, "print(_libc.prctl(39, 0, 0, 0, 0))") == ["1"]
    with opened(("no-new-privs", "capabilities")) as box:  # with CAP_SYS_ADMIN in its namespace the others install
        assert words(box, "print(_libc.prctl(39, 0, 0, 0, 0))") == ["0"]


def test_the_rlimit_alone_stops_descriptor_exhaustion() -> None:
    """H15"""
    attack = "attempt(lambda: [kept.append(os.dup(0)) for kept in [[]] for _ in range(200)])"
    with opened(limits={"open_files": 64}) as box:
        assert words(box, attack) == ["EMFILE"]
    with opened(("rlimits",), limits={"open_files": 64}) as box:
        assert words(box, attack) == ["through"]


def test_the_pids_limit_alone_stops_a_fork_bomb() -> None:
    """H15: cgroup as root, RLIMIT_NPROC as a user; a bomb of 60."""
    attack = "kept = []\nattempt(lambda: [kept.append(subprocess.Popen(['sleep', '3'])) for _ in range(60)])"
    with opened(limits={"pids": 24}) as box:
        assert words(box, attack) == ["EAGAIN"]
    with opened(limits={"pids": 256}) as box:
        assert words(box, attack) == ["through"]


def test_the_memory_limit_alone_stops_a_memory_bomb(box: Sandbox) -> None:
    """H15: the same 160 MiB, touched, under 64 MiB and under 512 MiB."""
    bomb = ["python3", "-c", "a = [bytearray(b'x') * (1 << 20) for _ in range(160)]; import time; time.sleep(0.4)"]
    with opened(limits={"memory_bytes": 64 * MIB}) as small:
        assert small.exec(bomb).status == "oom"
    assert box.exec(bomb).status == "ok"


def test_the_proc_mask_alone_hides_the_hosts_kernel(box: Sandbox) -> None:
    """H23"""
    attack = "for p in ('cmdline', 'modules', 'interrupts', 'sys/kernel/random/boot_id'): attempt(read, '/proc/' + p)\n"
    attack += "print(len(read('/proc/cmdline')) if os.path.exists('/proc/cmdline') else 0)"
    assert words(box, attack)[-1] == "0"
    with opened(("proc", *FILTERS)) as bare:
        assert words(bare, attack)[-1] == str(len(Path("/proc/cmdline").read_bytes()))


def test_a_pid_namespaces_own_proc_hides_other_processes(box: Sandbox) -> None:
    """H24: with its zygote's /proc instead it would see its zygote and every neighbour."""
    attack = "print(sorted(open(f'/proc/{p}/comm').read().strip() for p in os.listdir('/proc') if p.isdigit()).__len__())"
    with Sandbox(tier="native"):
        alone = int(words(box, attack)[0])
        with opened(("proc", *FILTERS)) as bare:
            assert int(words(bare, attack)[0]) > alone


def test_the_hidden_rule_alone_hides_a_file() -> None:
    """M5: a path that the policy hides reads as empty or refuses; without the rule it is there."""
    policy = {"extends": "default", "files": {"hidden": ["/etc/passwd"]}}
    attack = "print(len(read('/etc/passwd')))"
    with opened(policy=policy) as box:
        assert box.exec("cat /etc/passwd").stdout == ""
    with opened(("file-rules",), policy=policy) as box:
        assert int(words(box, attack)[0]) > 10


def test_the_uts_namespace_and_its_name_hide_the_hosts() -> None:
    """H23"""
    host = socket.gethostname()
    with opened() as box:
        assert words(box, "print(repr(os.uname().nodename))") == ["'sandbox'"]
    with opened(("hostname",)) as box:
        assert words(box, "print(repr(os.uname().nodename))") == [repr(host)]


def test_the_cgroup_namespace_alone_hides_where_in_the_hosts_tree_it_is() -> None:
    """H23"""
    attack = "print('fumehood' in open('/proc/self/cgroup').read())"
    seen_from_outside = Path("/proc/self/cgroup").read_text()
    with opened() as box:
        assert words(box, attack) == ["False"]
    if accounting.has_groups(native()._layout):
        with opened(("cgroup-namespace",)) as box:
            assert words(box, attack) == ["True"]
    else:
        own = "print(open('/proc/self/cgroup').read())"
        with opened(("cgroup-namespace",)) as box:
            assert words(box, own) == seen_from_outside.split()


def test_an_agent_that_is_not_dumpable_alone_keeps_its_memory_closed() -> None:
    """H16: user code has the agent's uid, so this is what stops /proc/1/mem."""
    attack = "attempt(read, '/proc/1/maps'); attempt(open, '/proc/1/mem', 'rb'); attempt(os.listdir, '/proc/1/fd')"
    with opened(("separate",)) as box:
        assert words(box, attack) == ["EACCES"] * 3
    with opened(("dumpable", "separate")) as box:
        assert words(box, attack) == ["through"] * 3


def test_the_network_namespace_alone_keeps_the_hosts_loopback_away(tmp_path: Path) -> None:
    """H9, H11: a service on the host's 127.0.0.1, such as a control plane. Both runs lack the connect() inspection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        attack = f"attempt(socket.create_connection, ('127.0.0.1', {port}), 2)"
        with template("apart") as t, opened(FILTERS, template=t) as box:
            assert words(box, attack) == ["ECONNREFUSED"]
        with template("joined") as t, opened(("loopback", *FILTERS), sc.NEWNET, template=t) as box:
            assert words(box, attack) == ["through"]


def test_the_connect_inspection_alone_refuses_and_names_an_address_outside() -> None:
    """H9: what a sandbox tries is known, not merely unroutable. A host that shares its network shows the difference."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"attempt(socket.create_connection, ('127.0.0.1', {port}), 2)\n"
        code += "attempt(socket.create_connection, ('192.0.2.1', 9), 2)"
        with opened() as box:
            result = box.run(PRELUDE + code)
            assert result.stdout.split() == ["ECONNREFUSED", "ENETUNREACH"]
            assert [c.address for c in result.connections] == ["192.0.2.1"]
        with opened(("seccomp-policy",)) as box:
            assert box.run(PRELUDE + code).connections == ()


def test_the_network_namespace_also_separates_abstract_sockets() -> None:
    """H24: one sandbox listens, the other connects; Landlock's scope (Linux 6.12) is gone in both runs."""
    listen = "s = socket.socket(socket.AF_UNIX); s.bind('\\0canary'); s.listen(); print('up')"
    attack = "attempt(socket.socket(socket.AF_UNIX).connect, '\\0canary')"
    for keep, without, expected in (
        (0, ("landlock", *FILTERS), "ECONNREFUSED"),
        (sc.NEWNET, ("loopback", *FILTERS), "EPERM" if landlock.abi() >= 6 else "through"),
        (sc.NEWNET, ("loopback", "landlock", *FILTERS), "through"),
    ):
        with template(f"sockets{keep}") as t, opened(without, keep, template=t) as a, opened(without, keep, template=t) as b:
            assert words(a, listen) == ["up"]
            assert words(b, attack) == [expected]


def test_the_ipc_namespace_alone_separates_shared_memory() -> None:
    """H24: a System V segment that everybody may attach."""
    make, attack = "attempt(syscall, 29, 0x66756d65, 4096, 0o1666)", "attempt(syscall, 29, 0x66756d65, 4096, 0o666)"
    for keep, expected in ((0, "ENOENT"), (sc.NEWIPC, "through")):
        with template(f"ipc{keep}") as t, opened(FILTERS, keep, template=t) as a, opened(FILTERS, keep, template=t) as b:
            assert words(a, make) == ["through"]
            assert words(b, attack) == [expected]


def test_one_sized_tmpfs_alone_stops_files_from_eating_memory() -> None:
    """H15"""
    attack = "attempt(lambda: write('/tmp/f', 'x' * (6 << 20)))"
    with opened(limits={"disk_bytes": 4 * MIB}) as box:
        assert words(box, attack) == ["ENOSPC"]
    with opened(limits={"disk_bytes": 16 * MIB}) as box:
        assert words(box, attack) == ["through"]


def test_a_barrier_that_fails_means_no_sandbox() -> None:
    """H13: each step of the recipe, made to fail; test_crash.py looks at what is left."""
    with switched(fail_at="landlock"), pytest.raises(SetupFailed) as e, Sandbox(tier="native"):
        pass
    assert "landlock" in str(e.value)


def test_a_domain_of_its_own_alone_keeps_one_process_from_tracing_another() -> None:
    """H16: between becoming dumpable and its filter a process must not be a sibling's way around its own."""
    attack = (
        "import ctypes, subprocess, sys\n"
        "other = int(open('/tmp/pid').read())\n"
        "print(ctypes.CDLL(None, use_errno=True).ptrace(16, other, 0, 0))"  # PTRACE_ATTACH
    )
    for off, expected in ((), "-1"), (("separate",), "0"):
        with opened((*FILTERS, *off)) as box:
            sleeper = box.start(["sleep", "20"])
            box.files.write("/tmp/pid", str(sleeper.pid))
            assert box.run(attack).stdout.strip() == expected
