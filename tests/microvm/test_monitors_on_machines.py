"""The process that a machine is on this host (H2, H3): what it may do, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import pytest
import vms
from hostile import LIMITS

from fumehood import Sandbox
from fumehood.client.calls import block_on
from fumehood.client.engine import Engine
from fumehood.errors import SandboxGone

pytestmark = [pytest.mark.microvm, pytest.mark.root]
SECCOMP_FILTER = "2"
FIRST_UID = 1 << 20  # of those that are no account's


@pytest.fixture(scope="module", params=hostile.TIERS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with hostile.engine(request, request.param) as engine:
        engine.tier = request.param  # pyright: ignore
        yield engine


@pytest.fixture(scope="module")
def tier(engine: Engine) -> str:
    return engine.tier  # pyright: ignore


@pytest.fixture(scope="module")
def box(tier: str) -> Iterator[Sandbox]:
    with Sandbox(tier=tier, url="", limits=LIMITS) as sandbox:
        yield sandbox


def machine(box: Sandbox) -> Any:
    return box.live.handle.machine  # pyright: ignore


def place(box: Sandbox) -> Path:
    """Where its monitor was started; the link is the host's, whatever its root is now."""
    directory = Engine.of_this_process().supervisor.runtime(box.live.tier)._places.directory  # pyright: ignore
    uid = Path(f"/proc/{machine(box).pid}").stat().st_uid
    return next(d for d in directory.iterdir() if any(p.stat().st_uid == uid for p in [d, *d.rglob("*")]))


def test_a_monitor_is_nobody_elses_user_and_may_do_next_to_nothing(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUMEHOOD_TEST_CANARY", "canary-of-the-host")
    with Sandbox(tier=tier, url="", limits=LIMITS) as one, Sandbox(tier=tier, url="", limits=LIMITS) as two:
        processes = [Path(f"/proc/{machine(box).pid}") for box in (one, two)]
        for process in processes:
            for thread in process.glob("task/*/status"):
                facts = dict(line.split(":\t", 1) for line in thread.read_text().splitlines())
                ids = set(facts["Uid"].split() + facts["Gid"].split())
                assert len(ids) == 1 and int(min(ids)) >= FIRST_UID and set(facts["Groups"].split()) <= ids
                assert {int(facts[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
                assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", SECCOMP_FILTER), thread
            assert not (process / "root/etc").exists() and not (process / "root/usr").exists()
            assert b"canary" not in (process / "environ").read_bytes()
            assert re.search("Max core file size +0 +0 ", (process / "limits").read_text())
        for kind in ("net", "ipc", "uts"):
            assert len({os.readlink(p / "ns" / kind) for p in (*processes, Path("/proc/self"))}) == 3
        assert len({p.stat().st_uid for p in processes}) == 2


def test_a_monitor_has_no_file_open_but_its_own_and_writes_to_none_that_others_read(box: Sandbox) -> None:
    process, own = Path(f"/proc/{machine(box).pid}"), place(box)
    mine = {(s.st_dev, s.st_ino) for s in (p.stat() for p in own.rglob("*"))}
    for link in process.glob("fd/*"):
        s = link.stat()
        assert not stat.S_ISDIR(s.st_mode) and not stat.S_ISBLK(s.st_mode), os.readlink(link)
        if stat.S_ISREG(s.st_mode) and s.st_nlink:
            assert (s.st_dev, s.st_ino) in mine, os.readlink(link)
        elif stat.S_ISCHR(s.st_mode):
            assert os.readlink(link) in ("/dev/null", "/dev/kvm", "/dev/urandom"), os.readlink(link)
    shared = [s for s in (p.lstat() for p in own.rglob("*")) if stat.S_ISREG(s.st_mode) and s.st_nlink > 1]
    assert shared and all(s.st_uid == 0 and not s.st_mode & 0o022 for s in shared)


def test_of_a_monitor_that_was_killed_its_user_is_told_and_nothing_is_left(tier: str) -> None:
    """Within the deadline of the run, not at it. A guest that panics ends the same way; no code of its user makes one."""
    box = Sandbox(tier=tier, url="", limits=LIMITS).open()
    pid, where = machine(box).pid, place(box)
    uid, groups = Path(f"/proc/{pid}").stat().st_uid, set(hostile.groups(pid).values())
    made = [group for group in groups if "fumehood" in str(group)]
    code = "print('begun', flush=True)\nwhile True: pass"
    result = box.run(code, timeout_s=100, on_stdout=lambda _: os.kill(pid, signal.SIGKILL))
    assert result.status == "killed" and result.cause
    with pytest.raises(SandboxGone):
        box.run("1")
    box.close()
    assert where.name and made and not where.exists() and not [g for g in made if g.exists()]
    assert vms.processes_of(uid, where) == []
    assert uid in Engine.of_this_process().supervisor.runtime(tier)._places._uids._free  # pyright: ignore


LEAVES = """
import json, os, sys
from fumehood import Sandbox
boxes = [Sandbox(tier=sys.argv[1], url="", limits={limits!r}).open() for _ in range(2)]
pids = [box.live.handle.machine.pid for box in boxes]
directory = boxes[0]._engine.supervisor.runtime(sys.argv[1])._places.directory
uids = [os.stat(f"/proc/{{pid}}").st_uid for pid in pids]
print(json.dumps({{"pids": pids, "uids": uids, "directory": str(directory)}}), flush=True)
{end}
"""


def left(request: pytest.FixtureRequest, tier: str, end: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A program that opens two machines, and does not close them."""
    env = {**os.environ, **hostile.environment(request, tier)}
    argv = [sys.executable, "-c", LEAVES.format(limits=LIMITS, end=end), tier]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout)


def living(facts: dict[str, Any]) -> list[int]:
    """Those of its monitors that still run, by pid and uid: this machine's pid 1 may never reap them."""
    there: list[int] = []
    for pid, uid in zip(facts["pids"], facts["uids"], strict=True):
        with contextlib.suppress(FileNotFoundError):
            found = hostile.status(pid)
            there += [pid] if found["Uid"].split()[0] == str(uid) and not found["State"].startswith("Z") else []
    return there


def test_a_program_that_ends_without_closing_its_machines_leaves_nothing(request: pytest.FixtureRequest, tier: str) -> None:
    done, facts = left(request, tier, "")
    alive, directory = living(facts), Path(facts["directory"])
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert (alive, directory.exists(), done.returncode, done.stderr) == ([], False, 0, "")


def test_what_a_killed_program_left_is_gone_when_the_next_one_starts(request: pytest.FixtureRequest, tier: str) -> None:
    """H19"""
    _, facts = left(request, tier, "os.kill(os.getpid(), 9)")
    assert len(living(facts)) == 2, "nobody was there to end them"
    env = {**os.environ, **hostile.environment(request, tier)}
    start = "import sys; from fumehood.client.engine import Engine; Engine.of_this_process().supervisor.runtime(sys.argv[1])"
    subprocess.run([sys.executable, "-c", start, tier], env=env, check=True, timeout=60)
    assert living(facts) == [] and not Path(facts["directory"]).exists()


@pytest.mark.parametrize("engine", ["qemu"], indirect=True)
def test_a_machine_whose_programs_come_and_go_is_bound_all_the_same(tier: str, engine: Engine) -> None:
    """H16: as each fork, restore and rollback of it is. Firecracker's guests have the same agent; on a pvm host their programs
    come too slowly to meet it."""
    with Sandbox(tier=tier, url="", limits=LIMITS) as box:
        for _ in range(6):
            box.start(["sh", "-c", "while :; do /bin/true; done"])
        for _ in range(8):
            block_on(engine, box.live.link.call("bind", env={}, **box.live.handle.identity(box.live.spec)))
