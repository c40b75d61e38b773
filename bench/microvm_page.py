"""The microVMs' section of docs/benchmarks.md, from one run's JSON and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.figures import ratio
from bench.page import MICROVM, put, verdict

_ROWS = {
    "restored": "made from the golden snapshot, first Python answer",
    "restored_pandas": "the same with pandas in the snapshot, first `df.describe()`",
    "claimed": "claimed from a warm pool: bound to its user, first answer",
    "live": "a run in a live one",
    "fork": "a live one forked 8 ways, all 8 answered from its state",
    "snapshot": "a live one copied to the disk, digests and all; it stands still for a part of that",
}


def write(report: dict[str, Any], data: Path, page: Path) -> None:
    put(page, MICROVM, "\n".join(_lines(report, f"[{data.name}]({os.path.relpath(data, page.parent)})")))


def _lines(report: dict[str, Any], link: str) -> Iterator[str]:
    machine = report["machine"]
    yield "\nWritten by `python -m bench.microvm`; do not edit. Through the supervisor, as the server makes them:"
    yield f"{machine['cpus']} × {machine['cpu']}, Linux {machine['kernel']}, {report['date']}. Raw data: {link}."
    if report["contended"]:
        yield f"\n**Taken on a busy machine, so worse than its own figures:** {report['contended']} before it began."
    yield "\nFirecracker runs here on a KVM that is itself emulated: user code at the processor's own speed, what the guest's"
    yield "kernel does at about 0.5 µs an instruction. QEMU emulates all of it (TCG), about 13 times slower for user code."
    yield "\n| target | limit | measured | |\n|---|---:|---:|---|"
    yield from map(verdict, report["targets"])
    yield "\n| | | ok | p50 | p95 | p99 | boot ÷ p50 |\n|---|---|---:|---:|---:|---:|---:|"
    for tier in ("firecracker", "qemu"):
        for name, what in _ROWS.items():
            yield _row(tier, what, report[tier][name], report[tier]["boot_s"], name)
    yield "\n| | boots in, s | with pandas | PSS of each of 8 clones, MiB | CPU of an idle one | of a paused one |"
    yield "|---|---:|---:|---:|---:|---:|"
    for tier in ("firecracker", "qemu"):
        r, boots = report[tier], report[tier]["boot_s"]
        shares = f"{r['idle_cpu_share']:.2%} | {r['paused_cpu_share']:.2%}"
        yield f"| {tier} | {boots['python']} | {boots['pandas']} | {r['pss_mib_each']} | {shares} |"


def _row(tier: str, what: str, row: dict[str, Any], boot_s: dict[str, float], name: str) -> str:
    figures = " | ".join(f"{row[p]:.1f}" if p in row else "" for p in ("p50_ms", "p95_ms", "p99_ms"))
    base = {"restored": "python", "restored_pandas": "pandas"}.get(name)
    times = f"{ratio(boot_s[base] * 1e3, row['p50_ms']):.0f}×" if base and "p50_ms" in row else ""
    return f"| {tier} | {what} | {row['ok']}/{row['attempts']} | {figures} | {times} |"
