"""The default profile, Landlock and the drop together cost honest programs nothing: none fails, none is counted (M16)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cell import confined

from fumehood.runtime.native import capabilities, landlock, seccomp

POLICY, REFUSED, FLOOR = seccomp.compile_policy(None), seccomp.refused_errno(None), seccomp.compile_floor()

STDLIB = """
import asyncio, concurrent.futures as pools, multiprocessing as mp, socket, sqlite3, subprocess, tempfile
from multiprocessing import shared_memory
if __name__ == "__main__":
    with pools.ProcessPoolExecutor(2) as p, pools.ThreadPoolExecutor(2) as t:
        print(p.submit(pow, 2, 3).result(), t.submit(pow, 2, 3).result())
    async def main():
        child = await asyncio.create_subprocess_exec("true")
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        return await child.wait(), await reader.read()
    print(asyncio.run(main()))
    shared = shared_memory.SharedMemory(create=True, size=10); shared.close(); shared.unlink()
    with tempfile.TemporaryDirectory() as d: sqlite3.connect(d + "/x").execute("create table t(a)")
"""
SCIENCE = """
import numpy as np, pandas as pd, matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
a = np.random.rand(600, 600)
print((a @ a).sum() > 0, pd.DataFrame({"a": [1, 2]}).a.sum())
plt.plot([1, 2]); plt.savefig("plot.png")
"""
WORKERS = "const {Worker} = require('worker_threads'); new Worker('console.log(6*7)', {eval: true})"
COMPILE = "echo 'int main(void){return 7;}' > a.c && cc a.c -o a && ./a; echo $?"
GIT = "git init -q . && echo a > a && git add a && git -c user.name=a -c user.email=b commit -qm x && git log --format=%s"


def work(argv: list[str], place: Path) -> Any:
    def prepare() -> None:
        capabilities.no_new_privs()
        landlock.restrict([str(place), "/dev/shm"])
        capabilities.drop_all()

    def probe() -> Any:
        env = {"PATH": os.environ["PATH"], "HOME": str(place), "TMPDIR": str(place)}
        ran = subprocess.run(argv, capture_output=True, text=True, cwd=place, env=env)
        return [ran.returncode, ran.stdout.strip(), ran.stderr[-500:]]

    return confined(probe, POLICY, REFUSED, floor=FLOOR, prepare=prepare, deadline_s=60)


PROGRAMS = {
    "stdlib": ([sys.executable, "-c", STDLIB], "8 8\n(0, b'')"),
    "ipython": ([sys.executable, "-m", "IPython", "--no-banner", "-c", "!echo hi"], "hi"),
    "bash": (["bash", "-c", "echo b a | tr ' ' '\\n' | sort | (read x; echo $x)"], "a"),
    "node": (["node", "-e", WORKERS], "42"),
    "compiler": (["sh", "-c", COMPILE], "7"),
    "git": (["sh", "-c", GIT], "x"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_honest_program_works_and_none_of_its_calls_is_counted(name: str, tmp_path: Path) -> None:
    argv, expected = PROGRAMS[name]
    needed = {"compiler": "cc", "git": "git"}.get(name, argv[0])
    if not shutil.which(needed):
        pytest.skip(f"{needed} is not installed here")
    out = work(argv, tmp_path)
    assert out.report == [0, expected, ""]
    assert out.events == []


@pytest.mark.data
def test_numpy_pandas_and_matplotlib_work_and_none_of_their_calls_is_counted(tmp_path: Path) -> None:
    out = work([sys.executable, "-c", SCIENCE], tmp_path)
    assert out.report[:2] == [0, "True 3"], out.report
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert out.events == []
