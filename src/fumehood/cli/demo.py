"""`fumehood demo`: an analysis of real data as a model would write it, then three hostile programs."""

from __future__ import annotations

import csv
import dataclasses
from importlib.resources import files as package_files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, files
from fumehood.errors import InvalidInput, NotFound
from fumehood.model import Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

app = typer.Typer(help="Show what a sandbox is for.", invoke_without_command=True)
DATA_SET = "seattle-weather.csv"


def _bounded(result: Result) -> bool:
    return result.status == "pids_limit"


def _got_nothing(result: Result) -> bool:
    refused = bool(result.connections) and not any(c.allowed for c in result.connections)
    return "0 secrets found" in result.stdout and refused


def _refused_and_bounded(result: Result) -> bool:
    counted = {s.name for s in result.refused_syscalls}
    return result.status == "oom" and {"ptrace", "mount", "unshare"} <= counted and "it worked!" not in result.stdout


# name, program, how the host tells that it was contained
_HOSTILE = (
    ("fork bomb", "fork_bomb.py", _bounded),
    ("read secrets, connect out", "steal.py", _got_nothing),
    ("trace, mount, unshare, then hog memory", "break_out.py", _refused_and_bounded),
)
_Outcomes = list[tuple[str, Result, bool]]  # name, result, contained
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one object and nothing else.")]
TierOption = Annotated[str, typer.Option(help="native or fake: what is shown is how the host's own kernel refuses.")]


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

    async def attempt() -> int:
        return await try_all(as_json, _checked(tier))

    exits.drive(attempt(), as_json=as_json)


def _checked(tier: str) -> str:
    """In a machine the attempts meet a kernel of its own, so that most of them neither are refused nor matter."""
    if tier not in ("auto", "native", "fake"):
        raise InvalidInput(
            f"the demo does not mean anything in the tier {tier}",
            cause="its attempts are at the host's kernel, and a machine has a kernel of its own",
            remediation="leave --tier out; the attacks on machines are tests/microvm/test_*_on_machines.py",
        )
    return "native" if tier == "auto" else tier


async def _demo(as_json: bool, out: Path, tier: str) -> int:
    tier = _checked(tier)
    analysis, copied = await _analyse(out, tier)
    hostile: _Outcomes = []
    for name, program, contained in _HOSTILE:
        result = await _hostile(program, tier)
        hostile.append((name, result, contained(result)))
    if as_json:
        exits.print_json(_object(analysis, copied, hostile))
    else:
        _show(analysis, copied, hostile)
    return 0 if analysis.ok and all(contained for *_, contained in hostile) else 1


async def _analyse(out: Path, tier: str) -> tuple[Result, list[str]]:
    from fumehood.client.sandbox import AsyncSandbox

    files.prepare(out)
    async with AsyncSandbox(tier=tier) as box:
        await box.files.upload(_data_set(), f"{files.HOME}/{DATA_SET}")
        result = await box.run(_program("analysis.py"))
        paths = [change.path for change in result.changes if change.kind != "removed"]
        refused = await files.copy_out(box, [p for p in paths if not p.endswith(DATA_SET) and "/." not in p], out)
    files.report(refused)
    return result, _names(out)


def _names(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.iterdir())


async def _hostile(program: str, tier: str) -> Result:
    from fumehood.client.sandbox import AsyncSandbox

    async with AsyncSandbox(tier=tier, limits={"timeout_s": 10}) as box:
        return await box.run(_program(program))


def _program(name: str) -> str:
    return (package_files("fumehood.demo") / name).read_text(encoding="utf-8")


def _data_set() -> Path:
    """The file as its package ships it; importing the package would import pandas on the host."""
    spec = find_spec("vega_datasets")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, "_data", DATA_SET)).is_file():
            return path
    raise NotFound(
        "the demo's data set is not installed",
        cause=f"no {DATA_SET} in the package vega_datasets",
        remediation="in the checkout: pip install '.[data]'",
    )


def _object(analysis: Result, copied: list[str], hostile: _Outcomes) -> dict[str, Any]:
    return {
        "analysis": dataclasses.asdict(analysis),
        "files": copied,
        "hostile": [{"name": n, "contained": c, "result": dataclasses.asdict(r)} for n, r, c in hostile],
    }


def _show(analysis: Result, copied: list[str], hostile: _Outcomes) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.rule("an analysis, as a model would write it")
    _show_analysis(console, analysis, copied)
    console.rule("three hostile programs")
    console.print(_hostile_table(hostile))
    for name, result, _ in hostile:
        if words := result.stdout.strip():
            console.print(Text(f"{name} said:", "bold"), Text(words, "dim"), sep="\n")


def _show_analysis(console: Console, result: Result, copied: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(Text(result.stdout.strip() + (result.error.traceback if result.error else "")))
    for path in copied:
        if path.endswith(".csv"):
            with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
                header, *rows = csv.reader(file)
            table = Table(title=path)
            for cell in header:
                table.add_column(Text(cell), justify="right")  # Text, not markup: guest output may hold [tags]
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
    usage = result.usage
    console.print(f"{result.status}: {usage.cpu_s:.2f} s of CPU, at most {usage.peak_memory_bytes >> 20} MiB")
    console.print("copied out:", ", ".join(copied))


def _hostile_table(hostile: _Outcomes) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("program", "outcome", "status", Column("what the host saw", overflow="fold"))
    for name, result, contained in hostile:
        outcome = Text("contained", "green") if contained else Text("NOT CONTAINED", "bold red")
        refused = ", ".join(f"{s.name} x{s.count}" for s in result.refused_syscalls)
        tried = ", ".join(f"{c.address}:{c.port}" for c in result.connections)
        seen = (result.cause, refused and f"refused: {refused}", tried and f"connections tried: {tried}")
        table.add_row(name, outcome, result.status, Text("\n".join(filter(None, seen))))
    return table
