"""What idle sandboxes cost, and what a guest can make this process hold."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack
from typing import Any

from bench import ours, processes
from fumehood import Sandbox
from fumehood.errors import FumehoodError, InvalidInput
from fumehood.model import GIB

_FILL = "import sys; block = 'x' * (1 << 20)\nfor _ in range(1 << 10): sys.stdout.write(block)"
_SPARSE = "open('/home/user/sparse', 'wb').truncate(1 << 40)"


def idle(count: int) -> dict[str, Any]:
    """`count` sandboxes that have been made and do nothing. `pss_mib` is of each; the zygote's own share is beside it.

    `host_mib` is what the host lacks for each, with what the kernel holds for namespaces, cgroups and page tables.
    """
    _raise_descriptor_limit()
    row: dict[str, Any] = {"sandboxes": count, "made": 0}
    with Sandbox(policy=ours.POLICY) as first, ExitStack() as stack:
        ours.run(first, "print")
        others = set(processes.family(os.getpid()))
        free_kib, started = processes.available_kib(), time.perf_counter()
        try:
            for _ in range(count):
                stack.enter_context(Sandbox(policy=ours.POLICY))
                row["made"] += 1
        except FumehoodError as e:
            row["failure"] = str(e)[-400:]
        row["made_in_s"] = round(time.perf_counter() - started, 2)
        time.sleep(1.0)
        own = [pid for pid in processes.family(os.getpid()) if pid not in others]
        made = max(1, row["made"])
        row |= {
            "processes": len(own),
            "pss_mib": round(sum(map(processes.pss_kib, own)) / 1024 / made, 3),
            "others_pss_mib": round(sum(map(processes.pss_kib, others)) / 1024, 1),
            "host_mib": round((free_kib - processes.available_kib()) / 1024 / made, 3),
        }
        began = time.perf_counter()
        stack.close()
        row["ended_in_s"] = round(time.perf_counter() - began, 2)
    return row


def _raise_descriptor_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def flood() -> dict[str, Any]:
    """1 GiB of output that no limit stops, captured up to the policy's cap: the peak of this process meanwhile."""
    limits = {"output_kill_bytes": 2 * GIB}
    with Sandbox(policy=ours.POLICY, limits=limits) as box, processes.Peak() as peak:
        started = time.perf_counter()
        result = box.run(_FILL)
        took_s = time.perf_counter() - started
    return {"grew_mib": peak.mib, "seconds": round(took_s, 2), "status": result.status, "kept_bytes": len(result.stdout)}


def sparse() -> dict[str, Any]:
    """files.read() of a 1 TB file that holds nothing, as a caller would write it: its end and the peak until then."""
    with Sandbox(policy=ours.POLICY) as box:
        made = box.run(_SPARSE)
        with processes.Peak() as peak:
            started = time.perf_counter()
            try:
                end = f"read {len(box.files.read('/home/user/sparse'))} bytes"
            except InvalidInput as e:
                end = f"refused: {e}"
            took_s = time.perf_counter() - started
    return {"grew_mib": peak.mib, "seconds": round(took_s, 2), "made": made.status, "end": end}
