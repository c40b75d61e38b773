"""Create, run, destroy for a while from several threads; and whether anything of it stays."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from bench import ours, processes
from bench.figures import summary
from bench.subjects import Wrong
from fumehood.client.engine import Engine
from fumehood.errors import FumehoodError

SETTLE_S = 2.0
RSS_ALLOWANCE_MIB = 8.0  # the allocator's own slack; a leak of 2 KiB for each sandbox would pass it within a run


def measure(seconds: float, callers: int) -> dict[str, Any]:
    """Rate, latency and what was left. A warm-up comes first, so that `before` is a supervisor that has worked."""
    _load(min(5.0, seconds), callers)
    time.sleep(SETTLE_S)
    before = held()
    samples, failures, took_s, seconds_counts = _load(seconds, callers)
    time.sleep(SETTLE_S)
    after = held()
    row = summary(samples, failures)
    del row["samples_ms"]
    return {
        "seconds": round(took_s, 2),
        "callers": callers,
        "per_s": round(len(samples) / took_s, 2),
        "per_s_by_second": seconds_counts,
        **row,
        "before": before,
        "after": after,
        "leaks": leaks(before, after),
    }


def _load(seconds: float, callers: int) -> tuple[list[float], list[str], float, list[int]]:
    ends, failures, samples = list[float](), list[str](), list[float]()
    started = time.perf_counter()

    def work() -> None:
        while time.perf_counter() - started < seconds:
            try:
                samples.append(ours.zygote("print")[""])
                ends.append(time.perf_counter() - started)
            except (Wrong, FumehoodError) as e:
                failures.append(f"{type(e).__name__}: {e}"[-400:])

    threads = [threading.Thread(target=work) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - started
    return samples, failures, took_s, [sum(int(e) == s for e in ends) for s in range(int(seconds))]


def held() -> dict[str, float]:
    """What this process, its zygotes and the host hold on behalf of sandboxes. Counts, and MiB for `*_mib`."""
    runtime: Any = Engine.of_this_process().supervisor.runtime("auto")
    family = processes.family(os.getpid())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "processes": len(family),
        "zombies": sum(processes.is_zombie(pid) for pid in family),
        "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "zygote_mounts": sum(processes.lines(f"/proc/{pid}/mountinfo") for pid in family),
        "zygote_descriptors": sum(processes.entries(f"/proc/{pid}/fd") for pid in family),
        "cgroups": sum(1 for d in processes.cgroups() if re.search(rf"/{runtime._instance.name}/", f"{d}/")),
        "free_uids": len(runtime._uids._free) if runtime._uids else 0,
        "rss_mib": round(processes.status_kib("self", "VmRSS") / 1024, 2),
        "zygote_rss_mib": round(sum(processes.status_kib(pid, "VmRSS") for pid in family) / 1024, 2),
    }


def leaks(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """One line for each thing that is not as it was; memory has an allowance."""
    found = [f"{k}: {before[k]} -> {after[k]}" for k in before if not k.endswith("_mib") and before[k] != after[k]]
    grown = [k for k in before if k.endswith("_mib") and after[k] - before[k] > RSS_ALLOWANCE_MIB]
    return found + [f"{k}: {before[k]} -> {after[k]}" for k in grown]
