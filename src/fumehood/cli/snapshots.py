"""`fumehood snapshot`, `snapshots`, `fork`, `rollback`: copies of sandboxes that live in a server, kept or running."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from fumehood.cli import exits, reach, show
from fumehood.cli.reach import JsonOption, KeyOption, UrlOption
from fumehood.cli.run import pairs, parse_duration
from fumehood.cli.sandboxes import each

SLOW_S = 120.0  # as the SDK waits: the memory of a sandbox is written to the disk, and processes are started
COLUMNS = ("id", "sandbox", "template", "tier", "size", "age", "labels")
SandboxArgument = Annotated[str, typer.Argument(metavar="SANDBOX", help="As ps shows it.")]
Labels = Annotated[list[str] | None, typer.Option("--label", help="K=V that the list shows (repeatable).")]

app = typer.Typer()


def snapshot(
    sandbox: SandboxArgument,
    label: Labels = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Keep a sandbox as it is now, memory and programs too; prints the snapshot's id."""

    async def work() -> int:
        metadata = pairs(label or [], "--label")
        made = await _ask(sandbox, "snapshots", {"metadata": metadata} if metadata else {}, url, api_key)
        if as_json:
            exits.print_json(made)
        else:
            print(show.word(made["id"]))
        return 0

    exits.drive(work(), as_json=as_json)


@app.callback(invoke_without_command=True)
def snapshots(
    context: typer.Context,
    sandbox: Annotated[str | None, typer.Option(metavar="SANDBOX", help="Of this one only.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 200,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List your snapshots in the server, newest first; rm ID... forgets them."""
    if context.invoked_subcommand is not None:
        return

    async def work() -> int:
        async with reach.admin(url, api_key) as admin:
            found = await admin.pages("/v1/snapshots", "snapshots", limit, sandbox_id=sandbox)
        if as_json:
            exits.print_json({"snapshots": found})
        elif quiet:
            print("\n".join(show.word(s["id"]) for s in found), end="\n" if found else "")
        else:
            show.table(COLUMNS, [_row(s, time.time()) for s in found])
        return 0

    exits.drive(work(), as_json=as_json)


def _row(kept: dict[str, Any], now: float) -> list[str]:
    metadata: dict[str, str] = kept.get("metadata") or {}
    facts = [kept[name] for name in ("id", "sandbox_id", "template", "tier")]
    labels = " ".join(f"{k}={v}" for k, v in metadata.items())
    return [*facts, show.size(kept["size_bytes"]), show.ago(kept["created_at"], now), labels]


@app.command()
def rm(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As snapshots shows them.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Forget snapshots; prints the id of each. Sandboxes that came from them go on."""
    each(ids, lambda admin, name: admin.ask("DELETE", f"/v1/snapshots/{name}"), as_json, url, api_key)


def fork(
    sandbox: SandboxArgument,
    count: Annotated[int, typer.Option("-n", "--count", help="How many.", min=1, max=64)] = 1,
    lease: Annotated[str | None, typer.Option(help="How long each lives, such as 10m.")] = None,
    label: Labels = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Make running copies of a sandbox, all or none; prints the id of each."""

    async def work() -> int:
        asked = {"lease_s": None if lease is None else parse_duration(lease), "metadata": pairs(label or [], "--label") or None}
        body = {"count": count, **{name: value for name, value in asked.items() if value is not None}}
        made = (await _ask(sandbox, "fork", body, url, api_key))["sandboxes"]
        if as_json:
            exits.print_json({"sandboxes": made})
        else:
            print("\n".join(show.word(s["id"]) for s in made))
        return 0

    exits.drive(work(), as_json=as_json)


def rollback(
    sandbox: SandboxArgument,
    name: Annotated[str, typer.Argument(metavar="ID", help="A snapshot of this sandbox, or a checkpoint of a context.")],
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Take a sandbox back to a snapshot or checkpoint; what happened in it since is undone."""

    async def work() -> int:
        await _ask(sandbox, "rollback", {"checkpoint" if ":" in name else "snapshot": name}, url, api_key)
        if as_json:
            exits.print_json({"sandbox": sandbox, "rolled_back_to": name})
        else:
            print(show.word(sandbox))
        return 0

    exits.drive(work(), as_json=as_json)


async def _ask(sandbox: str, verb: str, body: dict[str, Any], url: str | None, api_key: str | None) -> Any:
    from fumehood.client.admin import piece

    async with reach.admin(url, api_key, timeout_s=SLOW_S) as admin:
        return await admin.ask("POST", f"/v1/sandboxes/{piece(sandbox)}/{verb}", body=body)
