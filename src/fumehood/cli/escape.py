"""`fumehood demo escape`: every attempt of the table in a real sandbox of its own, judged by the host."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fumehood.cli import exits, files
from fumehood.client.sandbox import AsyncSandbox
from fumehood.demo import host as hosts
from fumehood.demo.escapes import ATTEMPTS, Attempt, Check, program
from fumehood.errors import AgentUnresponsive, FileFault, NotFound, SandboxGone, WireError
from fumehood.model import MIB, Result

LIMITS = {"memory_bytes": 256 * MIB, "disk_bytes": 32 * MIB, "pids": 64, "inodes": 4096, "timeout_s": 8,
          "output_kill_bytes": 8 * MIB}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    attempt: str
    hazard: str
    outcome: Literal["contained", "BREACH", "unproven"]
    by: str
    status: str
    evidence: tuple[str, ...] = ()  # what the probe said, what the host saw


async def escape(as_json: bool, tier: str) -> int:
    """0 if every attempt was contained, else 1."""
    verdicts: list[Verdict] = []
    async with hosts.watched() as host:
        for attempt in ATTEMPTS:
            verdicts.append(await judge(attempt, host, tier))
            if not as_json:
                _line(len(verdicts), verdicts[-1])
    counts = {kind: sum(v.outcome == kind for v in verdicts) for kind in ("contained", "BREACH", "unproven")}
    if as_json:
        exits.print_json({"attempts": [dataclasses.asdict(v) for v in verdicts], **counts})
    else:
        _table(verdicts, counts)
    return 0 if counts["contained"] == len(verdicts) else 1


async def judge(attempt: Attempt, host: hosts.Host, tier: str = "auto") -> Verdict:
    """Raises FumehoodError if there could be no sandbox: then nothing was tried, and nothing is proven."""
    try:
        result, seen = await _try(attempt, host, tier)
    except (SandboxGone, WireError, AgentUnresponsive) as e:
        # The attempt took its own sandbox down: contained only where the table expects that.
        kind = "contained" if "killed" in attempt.ends else "unproven"
        return Verdict(attempt.name, attempt.hazard, kind, attempt.barrier, e.code, (e.message, e.cause))
    return verdict(attempt, result, host, seen)


def verdict(attempt: Attempt, result: Result, host: hosts.Host, seen: list[str]) -> Verdict:
    """`seen` is what the host found afterwards. Its own facts outweigh all that the guest says."""
    lines = [line for line in result.stdout.split("\n") if line.startswith(("HELD ", "BREACH "))]
    seen = seen + host.breaches(result.stdout, result.stderr, repr(result.results)) + host.survivors()
    breaches = [line for line in lines if line.startswith("BREACH")] + seen
    if attempt.ends and result.status in attempt.ends and not seen:
        breaches = []  # the host ended it before it could finish; what it printed of its success is not one
    # A probe that failed half-way has not tried all that it says; its first words are no proof.
    finished = result.status == "ok" and any(line.startswith("HELD") for line in lines)
    proven = finished or result.status in attempt.ends
    outcome = "BREACH" if breaches else "contained" if proven else "unproven"
    evidence = tuple(breaches or lines) or (result.cause, (result.error.traceback if result.error else result.stderr)[-400:])
    return Verdict(attempt.name, attempt.hazard, outcome, _by(attempt, result, lines), result.status, evidence)


async def _try(attempt: Attempt, host: hosts.Host, tier: str) -> tuple[Result, list[str]]:
    async with AsyncExitStack() as stack:
        box = await stack.enter_async_context(AsyncSandbox(limits=LIMITS, env=attempt.env, tier=tier))
        context = None
        if attempt.plant:
            beside = attempt.check == "neighbour"
            planted = await stack.enter_async_context(AsyncSandbox(limits=LIMITS, tier=tier)) if beside else box
            await planted.run(program(attempt.plant, host.public))
            context = None if beside else (await planted.contexts.create("python")).id
        result = await box.run(program(attempt.probe, host.public), context=context)
        return result, await _CHECKS[attempt.check](box, host)


async def _nothing(box: AsyncSandbox, host: hosts.Host) -> list[str]:
    return []


async def _download(box: AsyncSandbox, host: hosts.Host) -> list[str]:
    """The planted links are followed inside or not at all; no byte of the host's comes back (H12)."""
    breaches: list[str] = []
    shadow = _lines_of("/etc/shadow")
    for name in ("loot", "shadow", "folder/secret", "magic/etc/shadow"):
        try:
            data = await box.files.read(f"{files.HOME}/{name}")
        except (FileFault, NotFound):
            continue
        if host.breaches(data.decode(errors="replace")) or shadow & set(data.split(b"\n")):
            breaches.append(f"{name} is the host's file")
    return breaches


def _lines_of(path: str) -> set[bytes]:
    try:
        return {line for line in Path(path).read_bytes().split(b"\n") if b":$" in line}  # those with a password
    except OSError:
        return set()


async def _copy_out(box: AsyncSandbox, host: hosts.Host) -> list[str]:
    """Names and kinds that a host must not follow: copied out by the same code as `run --out`, then looked at."""
    out = host.folder / "out"
    files.prepare(out)
    names = ("pipe", "sparse", "new\nline\x1b[2J", "not-utf8-\udcff", ".envrc", "../../etc/passwd", "../user/x")
    await asyncio.wait_for(files.copy_out(box, [f"{files.HOME}/{n}" for n in names], out), 20)
    copied = list(out.rglob("*"))
    odd = [p for p in copied if not p.is_file() or p.is_symlink() or p.name.startswith(".") or not p.name.isprintable()]
    return [f"written outside: {p!r}" for p in odd] + [f"{p!r} is huge" for p in copied if p.stat().st_size > 1 << 20]


async def _neighbour(box: AsyncSandbox, host: hosts.Host) -> list[str]:
    """Another sandbox, made afterwards, still computes what it should (H16)."""
    async with AsyncSandbox(limits=LIMITS) as other:
        result = await other.run("6 * 7")
    good = result.status == "ok" and result.text == "42" and result.usage.cpu_s < 60
    return [] if good else [f"a neighbour's 6 * 7 came to {result.status}, {result.text}"]


_CHECKS: dict[Check, Callable[[AsyncSandbox, hosts.Host], Awaitable[list[str]]]] = {
    "": _nothing,
    "new_context": _nothing,
    "download": _download,
    "copy_out": _copy_out,
    "neighbour": _neighbour,
}


def _by(attempt: Attempt, result: Result, lines: list[str]) -> str:
    """What stopped it, by the host's own count where there is one."""
    if result.refused_syscalls:
        return "seccomp EPERM, counted: " + ", ".join(f"{s.name} x{s.count}" for s in result.refused_syscalls)
    if result.status in attempt.ends:
        return f"{attempt.barrier} (status {result.status})"
    if attempt.check in ("download", "copy_out"):
        return f"{attempt.barrier} (the host looked)"
    first = next((line.removeprefix("HELD ") for line in lines if line.startswith("HELD")), "")
    return f"{attempt.barrier} ({first[:60]})" if first else attempt.barrier


_COLOURS = {"contained": "green", "BREACH": "bold red", "unproven": "yellow"}


def _line(number: int, verdict: Verdict) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{number:3}  {verdict.hazard:4} {verdict.attempt:44} ")
    Console(stderr=True).print(text.append(verdict.outcome, _COLOURS[verdict.outcome]))


def _table(verdicts: list[Verdict], counts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    fold = partial(Column, overflow="fold")  # evidence may be one long word; it is not to be cut
    table = Table(
        "hazard", fold("attempt"), fold("contained by"), "outcome", title="escape attempts, each in a sandbox of its own"
    )
    for v in verdicts:
        by = v.by if v.outcome == "contained" else "; ".join(v.evidence)
        # Text, not markup: guest output may hold [tags].
        table.add_row(v.hazard, v.attempt, Text(by), Text(v.outcome, _COLOURS[v.outcome]))
    console = Console()
    console.print(table)
    console.print(", ".join(f"{n} {kind}" for kind, n in counts.items()))
