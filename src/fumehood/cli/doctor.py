"""`fumehood doctor`: each protection as it is on this host, and what to do about those that are not in force."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

from fumehood.cli import exits
from fumehood.model import Enforcement, Protection

_COLOURS = {"enforced": "green", "degraded": "yellow", "off": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one object and nothing else.")] = False,
    tier: Annotated[str, typer.Option(help="auto, native or fake.")] = "auto",
) -> None:
    """Check this host; exit 1 when something that the default policy requires is not enforced."""
    exits.drive(_doctor(as_json, tier), as_json=as_json)


async def _doctor(as_json: bool, tier: str) -> int:
    from fumehood.client.sandbox import AsyncSandbox, capabilities

    found = capabilities(tier)
    lacking = unmet(AsyncSandbox(policy="default").spec.require, found.protections)
    good = found.available and not lacking
    if as_json:
        exits.print_json({**dataclasses.asdict(found), "ok": good, "lacking": lacking, "host": host_facts()})
    else:
        _show(found, lacking)
    return 0 if good else 1


def unmet(required: frozenset[str], protections: tuple[Protection, ...]) -> list[str]:
    """Required names that are not enforced, unknown ones among them."""
    enforced = {p.name for p in protections if p.state is Enforcement.ENFORCED}
    return sorted(required - enforced)


def host_facts() -> dict[str, Any]:
    """Kernel and machine, as read; None where this kernel has no such file."""
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "uid": os.geteuid(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "cgroup_v2": Path("/sys/fs/cgroup/cgroup.controllers").exists(),
        "security_modules": _read("/sys/kernel/security/lsm"),
        "max_user_namespaces": _read("/proc/sys/user/max_user_namespaces"),
        "unprivileged_userns_clone": _read("/proc/sys/kernel/unprivileged_userns_clone"),
        "apparmor_restricts_userns": _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        "kvm": os.access("/dev/kvm", os.R_OK | os.W_OK),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _show(found: Any, lacking: list[str]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    console.print(f"tier {found.tier}: {'available' if found.available else f'not available: {found.reason}'}")
    table = Table("protection", "state", Column("detail", overflow="fold"))
    for p in found.protections:
        name = f"{p.name} (required)" if p.name in lacking else p.name
        table.add_row(name, Text(str(p.state), _COLOURS[p.state]), p.detail)
    console.print(table)
    for fix in dict.fromkeys(p.fix for p in found.protections if p.fix):  # one fix often serves several
        names = ", ".join(p.name for p in found.protections if p.fix == fix)
        console.print(Text(f"{names}: ", "bold").append(fix, "not bold"))
    console.print(", ".join(f"{k} {v}" for k, v in host_facts().items() if v is not None), highlight=False)
