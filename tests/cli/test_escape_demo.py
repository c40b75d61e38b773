"""The escape demo: every attempt is contained in a sandbox, and the harmless ones do get through where there is none."""

import ast
import asyncio
import builtins
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fumehood.cli.escape import Verdict, verdict
from fumehood.demo import host as hosts
from fumehood.demo.escapes import ATTEMPTS, Attempt, program
from fumehood.model import Result

PLANTED = "fumehood-canary-" + "a1" * 16
BARE = [a for a in ATTEMPTS if a.bare]


@pytest.fixture(scope="module")
def report(command: list[str]) -> dict[str, Any]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/root", "SECRET_OF_THE_CALLER": PLANTED}
    done = subprocess.run(
        [*command, "demo", "escape", "--json"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout) | {"exit": done.returncode}


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda a: f"{a.hazard}-{a.name}")
def test_an_attempt_to_escape_is_contained(attempt: Attempt, report: dict[str, Any]) -> None:  # M1 M6 M24, H4-H25
    found = next(v for v in report["attempts"] if v["attempt"] == attempt.name)
    assert found["outcome"] == "contained", found


def test_the_command_leaves_with_zero_only_if_all_were_contained(report: dict[str, Any]) -> None:
    assert (report["exit"] == 0) == (report["contained"] == len(ATTEMPTS))


def test_the_table_covers_its_hazards_with_forty_attempts_or_more() -> None:
    assert len(ATTEMPTS) >= 40 and len({a.name for a in ATTEMPTS}) == len(ATTEMPTS)
    assert {a.hazard for a in ATTEMPTS} == {f"H{n}" for n in (4, 5, 6, 7, 8, 9, 12, 15, 16, 23, 24, 25)}


@pytest.mark.root
@pytest.mark.parametrize("attempt", BARE, ids=lambda a: a.name)
async def test_a_harmless_attempt_gets_through_without_a_sandbox(attempt: Attempt) -> None:
    """Else it could not tell a barrier from its absence."""
    async with hosts.watched() as host:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program(attempt.probe, host.public), stdout=-1, stderr=-1, env={"SECRET": PLANTED}
        )
        out, err = await asyncio.wait_for(process.communicate(), 30)
        result = Result("ok", stdout=out.decode(), stderr=err.decode())
        assert verdict(attempt, result, host, []).outcome == "BREACH", (out, err)


async def _verdict(attempt: Attempt, result: Result) -> Verdict:
    async with hosts.watched() as host:
        return verdict(attempt, result, host, [])


async def test_silence_proves_nothing() -> None:
    assert (await _verdict(ATTEMPTS[0], Result("error", stdout=""))).outcome == "unproven"


async def test_a_host_secret_anywhere_in_the_output_is_a_breach_whatever_the_guest_says() -> None:
    assert (await _verdict(ATTEMPTS[0], Result("ok", stdout=f"HELD all\n{PLANTED}"))).outcome == "BREACH"


async def test_one_breach_outweighs_many_that_held() -> None:
    assert (await _verdict(ATTEMPTS[0], Result("ok", stdout="HELD a\nHELD b\nBREACH c\n"))).outcome == "BREACH"


async def test_a_memfd_may_be_refused_instead_of_counted() -> None:  # H15, where there is no cgroup
    memfd = next(a for a in ATTEMPTS if a.name == "memory: memfd")
    assert (await _verdict(memfd, Result("syscall_refused"))).outcome == "contained"
    assert (await _verdict(memfd, Result("ok", stdout="BREACH 1 GiB in a memfd"))).outcome == "BREACH"


async def test_a_process_that_outlives_its_sandbox_is_a_breach() -> None:
    async with hosts.watched() as host:
        assert not host.survivors()
        marked = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(30)", host.mark)
        try:
            assert host.survivors() == [f"pid {marked.pid} outlived its sandbox"]
        finally:
            marked.kill()
            await marked.wait()


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda a: a.name)
def test_a_program_names_nothing_that_it_does_not_bring_along(attempt: Attempt) -> None:
    for act in filter(None, (attempt.probe, attempt.plant)):
        tree = ast.parse(program(act, {}))
        bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        bound |= {a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in (*n.args, *n.kwonlyargs)}
        bound |= {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
        bound |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ExceptHandler) and n.name}
        bound |= {a.vararg.arg for a in ast.walk(tree) if isinstance(a, ast.arguments) and a.vararg}
        assert set(_names(tree)) <= bound | set(dir(builtins)), set(_names(tree)) - bound


def test_ctrl_c_ends_it_quietly_and_leaves_nothing(command: list[str]) -> None:
    """The terminal signals the whole process group, the decoy and the sandboxes' parents among it."""
    demo = subprocess.Popen(
        [*command, "demo", "escape"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert demo.stderr is not None
    assert "contained" in demo.stderr.readline()
    children = _descendants(demo.pid)
    os.killpg(demo.pid, signal.SIGINT)
    stdout, stderr = demo.communicate(timeout=30)
    assert (demo.returncode, stdout) == (130, "") and all("contained" in line for line in stderr.splitlines()), stderr
    assert children and not any(map(_runs, children))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""  # a zombie, which this machine's pid 1 may never reap, has none
    except (FileNotFoundError, ProcessLookupError):
        return False


def _descendants(pid: int) -> list[int]:
    found = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return found + [below for child in found for below in _descendants(child)]


def test_without_a_sandbox_nothing_counts_as_contained(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "demo", "escape", "--json", "--tier", "microvm"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "attempts" not in json.loads(done.stdout)
    assert done.stderr.startswith("error: ")
