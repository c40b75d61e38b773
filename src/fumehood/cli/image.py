"""`fumehood image`: makes what microVMs start from, on this host: guest images and guest kernels, or all of it at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, prepare, show
from fumehood.cli.progress import Step, progress
from fumehood.cli.reach import JsonOption
from fumehood.errors import SetupFailed

if TYPE_CHECKING:
    from fumehood.runtime.microvm.assets import Assets, Manifest

app = typer.Typer(
    help="What microVMs start from: prepare, build, list. It is kept in the state directory.", no_args_is_help=True
)
app.command()(prepare.prepare)

_Build = Callable[["Assets", Step], "Manifest"]


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="python, data-analysis, minimal; with --root or --package any name.")] = "python",
    root: Annotated[Path | None, typer.Option(help="A directory with a root file system that has Python 3.")] = None,
    package: Annotated[list[str] | None, typer.Option("--package", help="A Debian package to make it of (repeatable).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a guest image: a read-only root file system with Python and the agent. The same inputs make the same bytes."""

    def make(assets: Assets, step: Step) -> Manifest:
        from fumehood.runtime.microvm import image, rootfs

        fill = rootfs.from_directory(root) if root else rootfs.from_packages(*package) if package else None
        return image.build_image(assets, name, fill, step)

    exits.drive(_build(make, as_json), as_json=as_json)


@app.command()
def kernel(
    profile: Annotated[
        str, typer.Option(help="small: compiled here. stock: the distribution's. pvm: for hosts that doctor says need it.")
    ] = "small",
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Compilers at once; 0: one for each CPU.", min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a guest kernel. Compiling takes some minutes of all CPUs; stock takes seconds."""

    def make(assets: Assets, step: Step) -> Manifest:
        from fumehood.runtime.microvm.kernel import build_kernel

        return build_kernel(assets, profile, step, jobs)

    exits.drive(_build(make, as_json), as_json=as_json)


@app.command(name="list")
def list_(as_json: JsonOption = False) -> None:
    """List what was made, and what is wrong with it, if anything."""

    async def work() -> int:
        from fumehood.runtime.microvm.assets import KINDS

        rows = [_row(kind, entry) for kind in KINDS for entry in _assets().all(kind)]
        if as_json:
            exits.print_json({"assets": rows})
        else:
            cells = [(r["kind"], r["name"], show.size(r["size_bytes"]), r["digest"][:12], r["error"] or "usable") for r in rows]
            show.table(["kind", "name", "size", "digest", "state"], cells)
        return 0

    exits.drive(work(), as_json=as_json)


async def _build(make: _Build, as_json: bool) -> int:
    started = time.monotonic()
    with progress(not as_json) as step:
        # A thread: Ctrl-C still arrives, also at the compilers and archivers, and their end is its end.
        made = await asyncio.to_thread(make, _assets(), step)
    row: dict[str, Any] = {
        **_row(made.kind, made),
        "seconds": round(time.monotonic() - started, 1),
        "directory": str(made.directory),
    }
    if as_json:
        exits.print_json(row)
    else:
        print(f"{row['kind']} {row['name']}: {show.size(row['size_bytes'])} in {row['seconds']} s, {row['directory']}")
    return 0


def _assets() -> Assets:
    from fumehood.config import Config
    from fumehood.runtime.microvm.assets import Assets

    return Assets(Config.load().state_dir)


def _row(kind: str, entry: Manifest | SetupFailed) -> dict[str, Any]:
    if isinstance(entry, SetupFailed):
        return _fields(kind, str(entry.details["name"]), error=entry.cause, remediation=entry.remediation)
    size_bytes = sum(stamp.size_bytes for stamp in entry.files.values())
    return _fields(kind, entry.name, size_bytes=size_bytes, digest=entry.digest, facts=dict(entry.facts))


def _fields(kind: str, name: str, **more: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {"size_bytes": 0, "digest": "", "facts": {}, "error": "", "remediation": ""}
    return {"kind": kind, "name": name, **empty, **more}
