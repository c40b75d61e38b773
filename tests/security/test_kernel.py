"""System calls, programs, paths and networks that got others into trouble; real calls through the public SDK."""

import os
from pathlib import Path

import pytest
from attack import FILTERS, INSIDE, PRELUDE, opened, template, words

from fumehood import Sandbox
from fumehood.errors import FileFault, FumehoodError, InvalidInput, ProtectionUnavailable
from fumehood.model import Mount, check_id

pytestmark = pytest.mark.rootless
CALLS = {
    "bpf": "321, 0, 0, 0", "io_uring_setup": "425, 8, 0", "userfaultfd": "323, 0", "perf_event_open": "298, 0, 0, -1, -1, 0",
    "keyctl": "250, 0, -3, 1", "add_key": "248, 0, 0, 0, 0, 0", "ptrace": "101, 0, 0, 0, 0", "unshare": "272, 0x10000000",
    "process_vm_readv": "310, 1, 0, 0, 0, 0, 0", "process_vm_writev": "311, 1, 0, 0, 0, 0, 0", "pidfd_getfd": "438, 0, 0, 0",
    "open_by_handle_at": "304, 0, 0, 0", "mount": "165, 0, 0, 0, 0, 0", "setns": "308, 0, 0", "chroot": "161, 0",
    "ioctl": "16, 0, 0x5412, 0", "clone": "56, 0x10000000 | 17, 0, 0, 0, 0", "kexec_load": "246, 0, 0, 0, 0",
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_dangerous_call_is_refused_counted_and_named(name: str, shared_box: Sandbox) -> None:
    """H25"""
    result = shared_box.run(PRELUDE + f"attempt(syscall, {CALLS[name]})")
    assert result.stdout in ("EPERM\n", "ENOSYS\n")
    assert [(r.name, r.count) for r in result.refused_syscalls] == [(name, 1)]


@pytest.mark.parametrize("family", [3, 16, 17, 38, 40, 44], ids=["ax25", "netlink", "packet", "alg", "vsock", "xdp"])
def test_an_address_family_other_than_unix_and_inet_is_refused(family: int, shared_box: Sandbox) -> None:
    """H4: AF_ALG above all."""
    assert words(shared_box, f"attempt(socket.socket, {family}, socket.SOCK_SEQPACKET)") == ["EAFNOSUPPORT"]


def test_foreign_entries_into_the_kernel_are_closed(shared_box: Sandbox) -> None:
    """H4: x32 numbers, and socket(AF_ALG) through int 0x80."""
    code = """
attempt(syscall, 0x40000000 + 41, 38, 5, 0)
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('53 89f8 89f3 4887ca cd80 5b 4898 c3'))
enter = ctypes.CFUNCTYPE(*[ctypes.c_long] * 5)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print(enter(359, 38, 5, 0))
"""
    assert words(shared_box, code) in (["EPERM", "-1"], ["ENOSYS", "-38"])


def test_arbitrary_bytecode_and_ctypes_are_allowed_and_harmless(shared_box: Sandbox) -> None:
    """H7: only the operating system's boundary counts, so nothing of Python is taken away."""
    code = "import gc, types\nf = (lambda: 0); f.__code__ = f.__code__.replace(co_code=f.__code__.co_code)\n"
    code += "print(len(gc.get_objects()) > 10, ctypes.string_at(id(f), 8) != b'')\nattempt(read, '/etc/shadow')"
    assert words(shared_box, code) == ["True", "True", "ENOENT"]


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONSTARTUP", "PYTHONPATH", "BASH_ENV", "LD_AUDIT", "PYTHONHOME"])
def test_what_the_caller_sets_runs_behind_the_last_barrier(name: str) -> None:
    """H8: an environment, a working directory and a home full of hooks; the barrier holds in the first line of each."""
    with Sandbox(tier="native", env={name: "/home/user/hook"}) as box:
        box.files.write("hook", "echo hooked; grep -c 'Seccomp:.2' /proc/self/status\n")
        box.files.write("sitecustomize.py", "print('hooked', open('/proc/self/status').read().count('Seccomp:\\t2'))\n")
        result = box.exec(["bash", "-c", "grep -h -E '^(Seccomp|NoNewPrivs|CapEff)' /proc/self/status"])
        if result.status == "ok":
            seen = dict(line.split() for line in result.stdout.splitlines() if ":\t" in line)
            assert (seen["Seccomp:"], seen["NoNewPrivs:"], int(seen["CapEff:"], 16)) == ("2", "1", 0)
        assert box.run("6 * 7").text == "42"


@pytest.mark.parametrize("address", ["1.1.1.1", "169.254.169.254", "10.0.0.1", "127.0.0.53", "fd00:ec2::254", "::ffff:8.8.8.8"])
@pytest.mark.parametrize("kind", ["STREAM", "DGRAM"])
def test_no_packet_leaves(address: str, kind: str, shared_box: Sandbox) -> None:
    """H9: raw addresses, DNS by UDP and TCP, metadata services, the host's resolver."""
    family = "socket.AF_INET6" if ":" in address else "socket.AF_INET"
    act = f"s = socket.socket({family}, socket.SOCK_{kind}); s.settimeout(1)\n"
    act += f"attempt(lambda: (s.connect(('{address}', 53)), s.send(b'x'), s.send(b'x'), s.recv(1)))"
    assert words(shared_box, act)[0] in ("ENETUNREACH", "ECONNREFUSED")


def test_no_packet_leaves_in_the_first_moments_either() -> None:
    """H9: tried by the first line that a new sandbox runs; there is no route to wait for."""
    with Sandbox(tier="native") as box:
        assert words(box, "print(open('/proc/net/route').read().count('\\n'))") == ["1"]  # the heading


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_a_file_that_is_no_file_neither_hangs_nor_misleads_the_host(kind: str, shared_box: Sandbox) -> None:
    """H12"""
    make = {"fifo": "os.mkfifo('odd')", "device": "os.symlink('/dev/zero', 'odd')", "socket": "socket.socket(1).bind('odd')"}
    shared_box.run(PRELUDE + "if os.path.lexists('odd'): os.unlink('odd')\n" + make[kind])
    with pytest.raises((FileFault, InvalidInput)):
        shared_box.files.read("odd")


def test_links_and_dots_lead_to_the_sandboxs_own_files(shared_box: Sandbox, tmp_path: Path) -> None:
    """H12: followed inside, where there is no host; and a planted link at the download's name is not followed."""
    shared_box.run("import os\nos.path.lexists('l') or os.symlink('/../../../etc/passwd', 'l')")
    assert "user:x:1000" in shared_box.files.read_text("l")
    assert shared_box.files.read("../../../../etc/passwd") == shared_box.files.read("/etc/passwd")
    assert Path("/etc/passwd").read_bytes() != shared_box.files.read("/etc/passwd")
    (tmp_path / "victim").write_text("host")
    (tmp_path / "got").symlink_to(tmp_path / "victim")
    shared_box.files.download("/etc/passwd", tmp_path / "got")
    assert (tmp_path / "victim").read_text() == "host"


def test_a_missing_protection_that_is_required_means_no_sandbox() -> None:
    """H13"""
    policy = {"extends": "default", "require": ["warp-drive"]}
    with pytest.raises((ProtectionUnavailable, InvalidInput)), Sandbox(tier="native", policy=policy):
        pass


@pytest.mark.parametrize("bad", ["../x", "a/b", "", "A", "x\n", "a" * 40, "s;rm", "s\0", "-rf", "é123"])
def test_an_id_that_could_be_a_path_is_refused(bad: str, shared_box: Sandbox) -> None:
    """H14: by the host's one pattern and by the agent's."""
    with pytest.raises(InvalidInput):
        check_id(bad)
    with pytest.raises(FumehoodError):
        shared_box.run("1", context=bad)


def test_a_canary_of_one_sandbox_is_invisible_to_the_next() -> None:
    """H24: files, shared memory, abstract sockets, processes; System V memory is in test_barriers.py."""
    plant = "for p in ('/tmp/c', '/home/user/c', '/dev/shm/c'): write(p)\ns = socket.socket(1); s.bind('\\0c'); s.listen()\n"
    plant += "subprocess.Popen(['sleep', '60']); print('planted')"
    look = "print(sum(os.path.exists(d + '/c') for d in ('/tmp', '/home/user', '/dev/shm')))\n"
    look += "attempt(socket.socket(1).connect, '\\0c'); print('sleep' in subprocess.run('cat /proc/*/comm', shell=True, "
    look += "capture_output=True, text=True).stdout.split())"
    with Sandbox(tier="native") as a:
        assert words(a, plant) == ["planted"]
        with Sandbox(tier="native") as b:
            assert words(b, look) == ["0", "ECONNREFUSED", "False"]
    with Sandbox(tier="native") as c:
        assert words(c, look) == ["0", "ECONNREFUSED", "False"]


def test_set_user_id_bits_and_devices_of_a_mount_mean_nothing(shared: Path) -> None:
    """M5: nosuid and nodev on every bind, also on a writable one."""
    (shared / "su").write_bytes(Path("/bin/true").read_bytes())
    os.chmod(shared / "su", 0o4755)
    with template("suid", Mount(str(shared), INSIDE, writable=True)) as t, opened(FILTERS, template=t) as box:
        options = next(line for line in box.exec("cat /proc/self/mountinfo").stdout.splitlines() if f" {INSIDE} " in line)
        assert "nosuid" in options and "nodev" in options, options
