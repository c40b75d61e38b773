"""What code in a machine gets at: nothing of the host, of its guest's PID 1, or of another machine."""

from __future__ import annotations

import signal
import socket

import pytest
from hostile import LIMITS, PRELUDE, words

from fumehood import Sandbox
from fumehood.demo import host as hosts

pytestmark = [pytest.mark.microvm, pytest.mark.root]
LOADERS = {name: "/home/user/hook" for name in ("LD_PRELOAD", "LD_AUDIT", "PYTHONSTARTUP", "BASH_ENV")}
PLANT = """
note = "import os; open('/home/user/ran', 'a').write(f'{os.getpid()} {os.getuid()}\\\\n')\\n"
for name in ('sitecustomize.py', 'usercustomize.py', 'socket.py', 'pwd.py'): write('/home/user/' + name, note)
write('/home/user/hook', 'echo $$ $UID >> /home/user/ran')
"""


def test_user_code_is_an_ordinary_user_in_a_context_and_in_a_program(box: Sandbox) -> None:
    script = 'echo /proc/self/fd/*; for f in status cgroup; do while read -r line; do echo "$line"; done < /proc/self/$f; done'
    program = box.exec(["sh", "-c", script]).stdout.split("\n")
    context = box.run("for name in ('status', 'cgroup'): print(open(f'/proc/self/{name}').read())").stdout.split("\n")
    for lines in (program, context):
        facts = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert facts["Uid"] == facts["Gid"] == ["1000"] * 4 and facts["Groups"] == [] and facts["NoNewPrivs"] == ["1"]
        assert {facts[f"Cap{kind}"][0] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0000000000000000"}
        assert "0::/user" in lines
    assert program[0].split() == [f"/proc/self/fd/{n}" for n in range(4)], "the last is the directory itself"


def test_all_that_can_be_written_is_its_own_three_directories_and_harmless_devices(box: Sandbox) -> None:
    """H6, H23: a walk through what is mounted writable and through the kernel's switches; the rest is a read-only disk."""
    code = """
own = {(s.st_dev, s.st_ino) for s in map(os.stat, ('/home/user', '/tmp', '/dev/shm'))}
for top in ('/dev', '/run', '/proc/sys', '/sys/fs/cgroup', '/proc', '/', '/sys/kernel', '/home'):
    for where, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = f'{where}/{name}'
            if os.access(path, os.W_OK) and not os.path.islink(path):
                s = os.stat(path)
                print('its-own' if (s.st_dev, s.st_ino) in own else path)
        if top in ('/', '/proc', '/sys/kernel'):
            break
        directories[:] = [d for d in directories if not os.access(f'{where}/{d}', os.W_OK)]
attempt(write, '/proc/sys/kernel/ns_last_pid', '1')
"""
    # A kernel that can restore checkpoints lets everybody open that one; to write takes a capability.
    checkpoints = {"/proc/sys/kernel/ns_last_pid", "EPERM"}
    nodes = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "pts/ptmx")}
    found = set(words(box, code))
    assert found - nodes in ({"its-own", "ENOENT"}, {"its-own", *checkpoints}) and found > nodes
    lines = [line.split() for line in box.run("print(open('/proc/self/mountinfo').read())").stdout.splitlines() if line]
    options = {line[4]: set(line[5].split(",")) for line in lines}
    assert all("nosuid" in each for each in options.values())
    assert {point for point, each in options.items() if "nodev" not in each} == {"/dev", "/dev/pts"}
    assert {"/", "/sys"} <= {point for point, each in options.items() if "ro" in each}


def test_no_call_reaches_pid_1(box: Sandbox) -> None:
    """H16, H25: its word on memory and forks is what the host believes."""
    code = """
import resource
files = ('mem', 'environ', 'maps', 'smaps', 'auxv', 'io', 'syscall', 'stack', 'personality', 'pagemap')
for name in files: attempt(read, f'/proc/1/{name}')
for name in ('fd', 'fdinfo', 'map_files', 'cwd', 'root'): attempt(os.listdir, f'/proc/1/{name}')
for name in ('exe', 'fd/0', 'ns/mnt', 'ns/net', 'ns/user'): attempt(os.open, f'/proc/1/{name}', os.O_RDONLY)
for name in ('mem', 'oom_score_adj', 'comm', 'clear_refs', 'coredump_filter'): attempt(write, f'/proc/1/{name}', '0')
fd = os.pidfd_open(1)
for number in signal.valid_signals(): attempt(os.kill, 1, number)
attempt(signal.pidfd_send_signal, fd, 9)
for request in (16, 0x4206): attempt(syscall, 101, request, 1, 0, 0)  # ptrace: ATTACH, SEIZE
attempt(syscall, 438, fd, 0, 0); attempt(syscall, 312, 1, 1, 0, 0, 0)  # pidfd_getfd, kcmp
attempt(resource.prlimit, 1, resource.RLIMIT_NOFILE); attempt(os.setpriority, os.PRIO_PROCESS, 1, 5)
attempt(os.sched_setaffinity, 1, {0}); attempt(os.sched_setscheduler, 1, os.SCHED_BATCH, os.sched_param(0))
attempt(syscall, 251, 1, 1, 3 << 13)  # ioprio_set
"""
    assert set(words(box, code)) <= {"EPERM", "EACCES", "ENOENT", "ENOSYS"}


def test_no_namespace_of_users_is_had(box: Sandbox) -> None:
    """H25: the way to capabilities over a great part of the guest's kernel."""
    code = "attempt(syscall, 272, 0x10000000)\npid = 0\n"
    code += "def clone():\n    if syscall(56, 0x10000000 | 17, 0, 0, 0, 0) == 0: os._exit(0)\nattempt(clone)"
    assert set(words(box, code)) <= {"ENOSPC", "EPERM", "EINVAL"}


def test_the_32_bit_entry_is_closed_but_in_a_distributions_kernel(box: Sandbox, guest_kernel: str) -> None:
    """H4: whoever takes it dies of it."""
    code = """
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex('53 89f8 89f3 4887ca cd80 5b 4898 c3'))
enter = ctypes.CFUNCTYPE(*[ctypes.c_long] * 5)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
if (pid := os.fork()) == 0:
    enter(20, 0, 0, 0)  # getpid
    os._exit(0)
print(os.waitpid(pid, 0)[1])
"""
    dead = int(words(box, code)[0])
    assert dead == 0 if guest_kernel == "stock" else dead in (signal.SIGSEGV, signal.SIGILL)


def test_planted_code_runs_as_the_user_only(tier: str) -> None:
    """H8: in programs and contexts that its own author starts; never in PID 1, which lists them."""
    with Sandbox(tier=tier, url="", limits=LIMITS, env={**LOADERS, "PYTHONPATH": "/home/user"}) as box:
        box.run(PRELUDE + PLANT)
        box.files.list("~")
        box.exec(["bash", "-c", ":"])
        box.run("import socket, usercustomize")
        ran = [line.split() for line in box.files.read_text("ran").splitlines()]
        assert len(ran) >= 2 and {uid for _, uid in ran} == {"1000"} and "1" not in {pid for pid, _ in ran}


def test_no_socket_leads_out(box: Sandbox) -> None:
    """H9: no address but its own, no metadata service, no port of the host's vsock, nor one that loops back to the agent."""
    code = """
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as s:
        s.settimeout(0.3)
        s.connect(address)
        s.send(b'x')
print(*(line.split(':')[0].strip() for line in open('/proc/net/dev').read().splitlines()[2:]))
print('routes', len(open('/proc/net/route').read().splitlines()))
for host in ('1.1.1.1', '169.254.169.254', '10.0.0.1', '192.168.0.1', '8.8.8.8', *HOSTS):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        attempt(connect, socket.AF_INET, (host, 53), kind)
for host in ('2606:4700:4700::1111', 'fd00:ec2::254', '::1'): attempt(connect, socket.AF_INET6, (host, 80))
for port in (PORT, 22): attempt(connect, socket.AF_INET, ('127.0.0.1', port))
for cid in (2, 1, 3, 0, 2**32 - 1):
    for port in (1024, 1, 22, 52, 5005) if cid == 2 else (1024,): attempt(connect, socket.AF_VSOCK, (cid, port))
"""
    with socket.create_server(("0.0.0.0", 0)) as server:
        host = {"HOSTS": sorted(hosts._addresses()), "PORT": server.getsockname()[1]}
        said = words(box, f"HOSTS, PORT = {host['HOSTS']!r}, {host['PORT']}\n{code}")
    interfaces, tries = said[: said.index("routes")], said[said.index("routes") + 1 :]
    assert set(interfaces) <= {"lo", "sit0"} and tries[0] == "1", "the heading alone"
    refused = {
        "ENETUNREACH",
        "EAFNOSUPPORT",
        "EADDRNOTAVAIL",
        "ECONNREFUSED",
        "ENODEV",
        "ECONNRESET",
        "TimeoutError('timed",
        "out')",
    }
    assert len(tries) > 25 and set(tries[1:]) <= refused


def test_who_takes_the_agents_port_or_floods_the_hosts_ports_does_not_keep_the_host_from_the_agent(box: Sandbox) -> None:
    """H16: the host comes back by a new connection after each copy."""
    code = """
kept = []
for cid in (2**32 - 1, 3, 2):
    s = socket.socket(socket.AF_VSOCK)
    try: s.bind((cid, 1024)); s.listen()
    except OSError: pass
    kept.append(s)
for n in range(40):
    s = socket.socket(socket.AF_VSOCK); s.setblocking(False); s.connect_ex((2, 2000 + n)); kept.append(s)
print('there')
"""
    assert words(box, code) == ["there"]
    (fork,) = box.fork(1)
    with fork:
        assert fork.run("len(kept)").text == box.run("len(kept)").text == "43"


LIE = {
    "type": "account",
    "oom_kills": 9,
    "pids_refused": 9,
    "pids_peak": 10**6,
    "disk_full": True,
    "status": "oom",
    "cpu_s": -1,
}


def test_what_a_session_says_of_the_machine_is_not_believed(box: Sandbox) -> None:
    """H16: on its own control socket, as its own run; that may cost it its session, and the next run a look at what is left."""
    find = "import gc; s = next(o for o in gc.get_objects() if type(o).__name__ == 'Session' and hasattr(o, '_control'))\n"
    for forged in (
        f"s._emit({{'type': 'account', **{LIE}}})",
        f"s._end({{'ok': {{'outcome': 'ok', 'execution_count': 1, **{LIE}}}}})",
    ):
        result = box.run(find + forged)
        assert result.status in ("ok", "error", "killed") and result.usage.cpu_s > 0 and result.usage.peak_pids < 100, result
    box.run("0")
    assert box.run("6 * 7").text == "42"


FILES = {"writable": ["/tmp", "/dev/shm"]}
RUN = "/run shows the tmpfs of all that is writable under another name: a bind of it below a directory of root's would not"


def test_what_the_policy_makes_read_only_is_written_by_no_other_name(tier: str) -> None:
    """H6"""
    with Sandbox(tier=tier, url="", limits=LIMITS, policy={"files": FILES}) as box:
        code = (
            "for p in ('/home/user', '/run/home', '/run/../run/home', '/proc/self/root/home/user'): attempt(write, f'{p}/x')\n"
        )
        code += "print(*os.listdir('/home/user'))"
        assert set(words(box, code)) <= {"EROFS", "EACCES", "ENOENT"}
