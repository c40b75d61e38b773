"""MicroVMs, measured through the supervisor as the server does it: `python -m bench.microvm`, after `fumehood image prepare`.

A row's figures are of one run of this program; every answer is checked; the cold boot stands beside each restore as its base.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench import processes
from bench.__main__ import ROOT, keep, opened, say
from bench.figures import ratio, summary
from bench.microvm_page import write
from bench.targets import Target, judge
from fumehood.config import Config
from fumehood.errors import FumehoodError
from fumehood.execution import Sinks
from fumehood.live import Live
from fumehood.model import CodeRequest, SandboxSpec
from fumehood.policy.resolve import resolve
from fumehood.runtime.microvm.driver import MicrovmHandle
from fumehood.runtime.rehearsal import rehearse
from fumehood.runtime.tiers import TIERS
from fumehood.supervisor import Supervisor

CLONES, IDLE_S = 8, 10.0
DESCRIBE = "import pandas as pd\nint(pd.DataFrame({'a': range(1000), 'b': 1.5}).describe().loc['count', 'a'])"


async def answer(live: Live, code: str = "6 * 7", want: str = "42") -> None:
    result = await live.run(CodeRequest(code), Sinks())
    if result.text != want:
        raise ValueError(f"{code!r} came to {result.text!r}: {result.status} {result.cause} {result.error}")


async def timed(work: Callable[[], Awaitable[None]], samples: int) -> dict[str, Any]:
    times, failures = list[float](), list[str]()
    for _ in range(samples):
        started = time.perf_counter()
        try:
            await work()
        except (FumehoodError, ValueError) as e:
            failures.append(str(e))
        else:
            times.append((time.perf_counter() - started) * 1e3)
    return summary(times, failures)


class Tier:
    def __init__(self, supervisor: Supervisor, name: str, samples: int) -> None:
        self._supervisor, self._name, self._samples = supervisor, name, samples

    async def measure(self) -> dict[str, Any]:
        spec, pandas = resolve("default"), resolve("default", template="data-analysis")
        say(f"{self._name}: the golden snapshots")
        rows: dict[str, Any] = {"boot_s": {"python": await self._boot_s(spec), "pandas": await self._boot_s(pandas)}}
        for what, work in {
            "restored": self._starts(spec, self._samples),
            "restored_pandas": self._starts(pandas, max(5, self._samples // 4), DESCRIBE, "1000"),
            "claimed": self._starts(spec, self._samples, warm=True),
        }.items():
            say(f"{self._name}: {what}")
            rows[what] = await work
        live = await self._supervisor.make(spec, self._name)
        say(f"{self._name}: live, fork, idle")
        rows["live"] = await timed(lambda: answer(live), self._samples)
        rows["snapshot"] = await timed(lambda: self._snapshot(live), 5)
        rows |= await self._fork(live)
        await self._supervisor.close_sandbox(live.id)
        return rows

    async def _boot_s(self, spec: SandboxSpec) -> float:
        """Of the golden snapshot's machine, when that was made: to its agent's first answer."""
        live = await self._supervisor.make(spec, self._name)
        assert isinstance(live.handle, MicrovmHandle)
        await self._supervisor.close_sandbox(live.id)
        return live.handle.origin.facts["boot_s"]

    async def _starts(
        self, spec: SandboxSpec, samples: int, code: str = "6 * 7", want: str = "42", *, warm: bool = False
    ) -> dict[str, Any]:
        """Each when the one before is gone. `warm`: asked of those that the server's pool has ready (service/source.py)."""
        times, failures = list[float](), list[str]()
        for _ in range(samples):
            async with contextlib.AsyncExitStack() as stack:
                started = time.perf_counter()
                try:
                    live = await self._supervisor.make(spec, self._name)
                    stack.push_async_callback(self._supervisor.close_sandbox, live.id)
                    if warm:
                        await rehearse(live.link)
                        await asyncio.sleep(0.05)
                        started = time.perf_counter()
                        await live.bind(spec)
                    await answer(live, code, want)
                except (FumehoodError, ValueError) as e:
                    failures.append(str(e))
                else:
                    times.append((time.perf_counter() - started) * 1e3)
        return summary(times, failures)

    async def _snapshot(self, live: Live) -> None:
        made = await self._supervisor.snapshot(live)
        await self._supervisor.discard(made.id, self._name)

    async def _fork(self, live: Live) -> dict[str, Any]:
        token = secrets.token_hex(8)
        await answer(live, f"token = {token!r}; token", repr(token))
        times = list[float]()
        for _ in range(5):
            started = time.perf_counter()
            clones = await self._supervisor.fork(live, CLONES)
            await asyncio.gather(*(answer(clone, "token", repr(token)) for clone in clones))
            times.append((time.perf_counter() - started) * 1e3)
            pids = [clone.handle.machine.pid for clone in clones if isinstance(clone.handle, MicrovmHandle)]
            pss_mib = sum(map(processes.pss_kib, pids)) / 1024 / len(pids)
            idle = await _cpu_share(pids)
            for clone in clones:
                await clone.pause()
            paused = await _cpu_share(pids)
            for clone in clones:
                await self._supervisor.close_sandbox(clone.id)
        shares = {"idle_cpu_share": round(idle, 5), "paused_cpu_share": round(paused, 5)}
        return {"fork": summary(times, ()), "pss_mib_each": round(pss_mib, 2), **shares}


async def _cpu_share(pids: Sequence[int]) -> float:
    """Of one processor, of each of these on average."""
    before, began = sum(map(_cpu_s, pids)), time.perf_counter()
    await asyncio.sleep(IDLE_S / 5)
    return (sum(map(_cpu_s, pids)) - before) / (time.perf_counter() - began) / len(pids)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _p(tier: str, row: str, p: str = "p50_ms") -> Callable[[dict[str, Any]], float]:
    return lambda report: report[tier][row][p]


def _over(report: dict[str, Any]) -> float:
    return ratio(report["firecracker"]["restored_pandas"]["p50_ms"], report["firecracker"]["restored"]["p50_ms"])


TARGETS = (
    Target("firecracker: restored, first Python answer, p50", "ms", 60, False, _p("firecracker", "restored")),
    Target("the same, p95", "ms", 110, False, _p("firecracker", "restored", "p95_ms")),
    Target("firecracker: claimed from a warm pool, first answer, p50", "ms", 60, False, _p("firecracker", "claimed")),
    Target("firecracker: fork of a live sandbox, 8 ways, all answered, p50", "ms", 400, False, _p("firecracker", "fork")),
    Target("firecracker: PSS of each clone", "MiB", 4, False, lambda r: r["firecracker"]["pss_mib_each"]),
    Target("firecracker: first describe() of a restored pandas over a restored 6 * 7", "×", 2, False, _over),
    Target("firecracker: CPU of a paused clone", "of one", 0, False, lambda r: r["firecracker"]["paused_cpu_share"]),
    Target("qemu (TCG): restored, first Python answer, p50", "ms", 120, False, _p("qemu", "restored")),
    Target("qemu: CPU of a paused clone", "of one", 0, False, lambda r: r["qemu"]["paused_cpu_share"]),
)


async def _measure(names: list[str], samples: int) -> dict[str, Any]:
    supervisor = Supervisor(Config.load(), TIERS)
    try:
        return {name: await Tier(supervisor, name, samples).measure() for name in names}
    finally:
        await supervisor.aclose()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.microvm", description=__doc__)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tier", action="append", default=[], help="firecracker, qemu; one alone writes no page")
    parser.add_argument("--force", action="store_true", help="measure a busy machine; the result says that it was")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="where the JSON goes")
    options = parser.parse_args(argv)
    if (report := opened(options.force)) is None:
        return 3
    names = options.tier or ["firecracker", "qemu"]
    report |= uvloop.run(_measure(names, options.samples))
    report["targets"] = judge(TARGETS, report) if len(names) == 2 else []
    data = keep(report, options.out, "-microvm")
    if len(names) == 2:
        write(report, data, ROOT / "docs/benchmarks.md")
        say("wrote docs/benchmarks.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
