"""`fumehood doctor`: each tier and each protection as it is on this host, and what to do about those that are not in force."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, show
from fumehood.cli.progress import progress
from fumehood.errors import InvalidInput, ProtectionUnavailable
from fumehood.model import Enforcement, Protection

if TYPE_CHECKING:
    from fumehood.config import Config
    from fumehood.runtime.base import Capabilities
    from fumehood.runtime.tiers import Choice, Standing

_COLOURS = {"enforced": "green", "degraded": "yellow", "off": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one object and nothing else.")] = False,
    tier: Annotated[str, typer.Option(help="auto, native, firecracker, qemu or fake.")] = "auto",
    boot: Annotated[bool, typer.Option("--boot", help="Boot a guest now, of the microVM tiers or of --tier alone.")] = False,
) -> None:
    """Check this host; exit 1 when something that the default policy requires is not enforced."""
    exits.drive(_doctor(as_json, tier, boot), as_json=as_json)


async def _doctor(as_json: bool, tier: str, boot: bool) -> int:
    from fumehood.client.sandbox import AsyncSandbox
    from fumehood.config import Config
    from fumehood.runtime.tiers import choose

    config = Config.load()
    booted = await _boot(config, tier, as_json) if boot else True
    found, auto = _capabilities(tier), choose(config)
    standings = _standings(config, found)
    lacking = unmet(AsyncSandbox(policy="default").spec.require, found.protections)
    good = found.available and not lacking and booted
    if as_json:
        tiers = {
            "auto": {"tier": auto.tier, "why": auto.why, "weaker": auto.weaker},
            "tiers": [dataclasses.asdict(s) for s in standings],
        }
        exits.print_json({**dataclasses.asdict(found), "ok": good, "lacking": lacking, **tiers, "host": host_facts()})
    else:
        _show(found, lacking)
        _show_tiers(auto, standings)
        _show_host()
    return 0 if good else 1


async def _boot(config: Config, tier: str, as_json: bool) -> bool:
    """Whether a guest of each came up. Tiers whose monitor is not on this host are left out, unless one is named."""
    from fumehood.runtime.microvm.proof import Proof, program
    from fumehood.runtime.microvm.selftest import prove
    from fumehood.runtime.tiers import MICROVM

    tiers = [t for t in MICROVM if program(config, t)] if tier == "auto" else [tier]
    if not set(tiers) <= set(MICROVM):
        raise InvalidInput(f"--boot --tier {tier}", cause="it boots no guest", remediation=f"known: {', '.join(MICROVM)}")
    proofs: list[Proof] = []
    with progress(not as_json) as step:
        for each in tiers:
            stored = Proof.load(config, each)
            kernels = [stored.kernel] if stored.proven else None
            proofs.append(await prove(config, each, step, image=stored.image or "python", kernels=kernels))
    return all(proof.proven for proof in proofs)


def _capabilities(tier: str) -> Capabilities:
    """One that is not proven here is a finding, not a failure."""
    from fumehood.client.sandbox import capabilities
    from fumehood.runtime.base import Capabilities

    try:
        return capabilities(tier)
    except ProtectionUnavailable as e:
        return Capabilities(tier, available=False, protections=(), reason=str(e))


def _standings(config: Config, found: Capabilities) -> list[Standing]:
    from fumehood.runtime.tiers import MICROVM, Standing, microvm

    native = found if found.tier == "native" else _capabilities("native")
    detail = "namespaces, seccomp and Landlock; it shares the host's kernel" if native.available else ""
    rows = [Standing("native", native.available, detail, native.reason)]
    return [*rows, *(microvm(config, tier) for tier in MICROVM)]


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


def _show(found: Capabilities, lacking: list[str]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console()
    state = "available" if found.available else f"not available: {show.harmless(found.reason)}"
    console.print(Text(f"tier {found.tier}: {state}"))
    table = Table("protection", "state", Column("detail", overflow="fold"))
    for p in found.protections:
        name = f"{p.name} (required)" if p.name in lacking else p.name
        table.add_row(name, Text(str(p.state), _COLOURS[p.state]), p.detail)
    console.print(table)
    for fix in dict.fromkeys(p.fix for p in found.protections if p.fix):  # one fix often serves several
        names = ", ".join(p.name for p in found.protections if p.fix == fix)
        console.print(Text(f"{names}: ", "bold").append(fix, "not bold"))


def _show_tiers(auto: Choice, standings: list[Standing]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("tier", "state", "tried", Column("detail", overflow="fold"))
    for s in standings:
        state = Text("usable", "green") if s.usable else Text("lost" if s.lost else "not proven", "red" if s.lost else "yellow")
        # What a guest's console said is in the reason: hostile text.
        detail = s.detail if s.usable else show.harmless("; ".join(filter(None, (s.reason, s.fix))))
        table.add_row(s.tier, state, f"{show.ago(s.at)} ago" if s.at else "", Text(detail))
    console = Console()
    console.print(table)
    console.print(Text(f"auto is {auto.tier}: {show.harmless(auto.why)}"))
    if auto.weaker:
        console.print(Text(f"warning: {show.harmless(auto.weaker)}", "red"))


def _show_host() -> None:
    from rich.console import Console

    Console().print(", ".join(f"{k} {v}" for k, v in host_facts().items() if v is not None), highlight=False)
