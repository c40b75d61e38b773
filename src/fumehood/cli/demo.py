"""`fumehood demo`: an analysis of real data as a model would write it, then three hostile programs."""

from __future__ import annotations

import dataclasses
from importlib.resources import files as package_files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fumehood.cli import exits, files
from fumehood.errors import InvalidInput
from fumehood.model import Result

app = typer.Typer(help="Show what a sandbox is for.", invoke_without_command=True)
DATA_SET = "seattle-weather.csv"
_HOSTILE = (
    ("fork bomb", "fork_bomb.py"),
    ("read secrets, connect out", "steal.py"),
    ("trace, mount, unshare, then hog memory", "break_out.py"),
)
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one object and nothing else.")]
TierOption = Annotated[str, typer.Option(help="auto, native, oci or microvm.")]


@app.callback()
def demo(
    context: typer.Context,
    as_json: JsonFlag = False,
    out: Annotated[Path, typer.Option(help="Where the picture and the table go.")] = Path("out"),
    tier: TierOption = "auto",
) -> None:
    """Analyse a real data set in a sandbox, then run three hostile programs and show what became of them."""
    if context.invoked_subcommand is None:
        exits.drive(_demo(as_json, out, tier), as_json=as_json)


@app.command()
def escape(as_json: JsonFlag = False, tier: TierOption = "auto") -> None:
    """Try to break out, in every way of the table; exit 1 on any breach."""
    from fumehood.cli.escape import escape as try_all

    exits.drive(try_all(as_json, tier), as_json=as_json)


async def _demo(as_json: bool, out: Path, tier: str) -> int:
    analysis, copied = await _analyse(out, tier)
    hostile = [(name, await _hostile(program, tier)) for name, program in _HOSTILE]
    contained = all(_contained(result) for _, result in hostile)
    if as_json:
        exits.print_json(_object(analysis, copied, hostile))
    else:
        _show(analysis, copied, hostile)
    return 0 if analysis.ok and contained else 1


async def _analyse(out: Path, tier: str) -> tuple[Result, list[str]]:
    from fumehood.client.sandbox import AsyncSandbox

    async with AsyncSandbox(tier=tier) as box:
        await box.files.upload(_data_set(), f"{files.HOME}/{DATA_SET}")
        result = await box.run(_program("analysis.py"))
        paths = [change.path for change in result.changes if change.kind != "removed"]
        refused = await files.copy_out(box, [p for p in paths if not p.endswith(DATA_SET) and "/." not in p], out)
    files.report(refused)
    return result, _names(out)


def _names(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.iterdir()) if folder.exists() else []


async def _hostile(program: str, tier: str) -> Result:
    from fumehood.client.sandbox import AsyncSandbox

    async with AsyncSandbox(tier=tier, limits={"timeout_s": 10}) as box:
        return await box.run(_program(program))


def _contained(result: Result) -> bool:
    got_through = ("it worked!", "sent to", "root:$")
    return not any(word in result.stdout for word in got_through)


def _program(name: str) -> str:
    return (package_files("fumehood.demo") / name).read_text(encoding="utf-8")


def _data_set() -> Path:
    """The file as its package ships it; importing the package would import pandas on the host."""
    spec = find_spec("vega_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, "_data", DATA_SET)).is_file():
            return path
    raise InvalidInput(
        "the demo's data set is not installed",
        cause=f"no {DATA_SET} in the package vega_datasets",
        remediation="pip install 'fumehood[data]'",
    )


def _object(analysis: Result, copied: list[str], hostile: list[tuple[str, Result]]) -> dict[str, Any]:
    return {
        "analysis": dataclasses.asdict(analysis),
        "files": copied,
        "hostile": [{"name": n, "contained": _contained(r), "result": dataclasses.asdict(r)} for n, r in hostile],
    }


def _show(analysis: Result, copied: list[str], hostile: list[tuple[str, Result]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.rule("an analysis, as a model would write it")
    console.print(Text(analysis.stdout + (analysis.text or "") + (analysis.error.traceback if analysis.error else "")))
    usage = analysis.usage
    console.print(f"{analysis.status}, {usage.cpu_s:.2f} s of CPU, {usage.peak_memory_bytes >> 20} MiB; copied out: {copied}")
    console.rule("three hostile programs")
    table = Table("program", "status", "cause", "refused", "connections", "its own words")
    for name, result in hostile:
        refused = ", ".join(f"{s.name} x{s.count}" for s in result.refused_syscalls)
        tried = ", ".join(f"{c.address}:{c.port}" for c in result.connections)
        status = Text(result.status, "green" if _contained(result) else "bold red")
        table.add_row(name, status, result.cause, refused, tried, Text(result.stdout.strip()))
    console.print(table)
