"""`fumehood create`, `ps`, `kill`, `pause`, `resume`: the sandboxes that live in a server."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, profiles, reach, show
from fumehood.cli.reach import JsonOption, KeyOption, UrlOption
from fumehood.cli.run import limits_of, pairs, parse_duration
from fumehood.errors import FumehoodError, InvalidInput

if TYPE_CHECKING:
    from fumehood.client.admin import Admin

Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Sandboxes, as ps shows them.")]


def create(
    policy: Annotated[str | None, typer.Option(help="A preset or a policy file.")] = None,
    template: Annotated[str | None, typer.Option(help="What the sandbox is made from.")] = None,
    snapshot: Annotated[str | None, typer.Option(metavar="ID", help="What it goes on from.")] = None,
    tier: Annotated[str, typer.Option(help="auto, native, firecracker or qemu.")] = "auto",
    memory: Annotated[str | None, typer.Option(help="Memory, such as 512M or 2G.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Processors, such as 0.5.")] = None,
    pids: Annotated[int | None, typer.Option(help="Processes and threads.")] = None,
    disk: Annotated[str | None, typer.Option(help="Bytes of files, such as 256M.")] = None,
    timeout: Annotated[str | None, typer.Option(help="The longest that one execution in it may take.")] = None,
    lease: Annotated[str | None, typer.Option(help="How long it lives, such as 10m.")] = None,
    on_expiry: Annotated[str, typer.Option(help="kill or pause, when that is over.")] = "kill",
    auto_resume: Annotated[bool, typer.Option("--auto-resume", help="A paused one wakes when it is used.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", help="K=V (repeatable).")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", help="K=V that ps shows (repeatable).")] = None,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Make a sandbox that lives on in the server, and print its id."""

    async def work() -> int:
        seconds = None if timeout is None else parse_duration(timeout)
        limits = limits_of(timeout_s=seconds, memory_bytes=memory, cpus=cpus, pids=pids, disk_bytes=disk)
        asked: dict[str, Any] = {"template": template, "limits": limits, "tier": tier, "on_expiry": _ends(on_expiry)}
        asked |= {"auto_resume": auto_resume, "env": pairs(env or [], "--env"), "metadata": pairs(label or [], "--label")}
        asked |= {"lease_s": None if lease is None else parse_duration(lease), "policy": policy, "snapshot": snapshot}
        with profiles.named(policy):
            return await _create({k: v for k, v in asked.items() if v is not None}, as_json, url, api_key)

    exits.drive(work(), as_json=as_json)


def _ends(on_expiry: str) -> str:
    if on_expiry not in ("kill", "pause"):
        raise InvalidInput(f"bad --on-expiry {on_expiry!r}", cause="there are two ways", remediation="write kill or pause")
    return on_expiry


async def _create(asked: dict[str, Any], as_json: bool, url: str | None, api_key: str | None) -> int:
    from fumehood.client.sandbox import AsyncSandbox

    found = await reach.server(url, api_key)
    box = await AsyncSandbox(url=found.url, api_key=found.api_key, **asked).open()  # never closed: it is to live on
    if as_json:
        async with reach.admin(found.url, found.api_key) as admin:
            exits.print_json(await admin.get(f"/v1/sandboxes/{box.id}"))
    else:
        print(box.id)
    return 0


def ps(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also those that ended, with the cause.")] = False,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=10_000)] = 200,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Ids only.")] = False,
    as_json: JsonOption = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """List your sandboxes in the server, newest first."""

    async def work() -> int:
        async with reach.admin(url, api_key) as admin:
            found = await admin.pages("/v1/sandboxes", "sandboxes", limit)
            if everything and len(found) < limit:
                found += await admin.pages("/v1/sandboxes", "sandboxes", limit - len(found), state="stopped")
        if as_json:
            exits.print_json({"sandboxes": found})
        elif quiet:
            print("\n".join(show.word(s["id"]) for s in found), end="\n" if found else "")
        else:
            _table(found, everything)
        return 0

    exits.drive(work(), as_json=as_json)


def _table(found: list[dict[str, Any]], everything: bool) -> None:
    columns = ["id", "state", "policy", "template", "tier", "age", "lease left", "labels", *(["ended"] if everything else [])]
    show.table(columns, [_row(s, time.time())[: len(columns)] for s in found])


def _row(record: dict[str, Any], now: float) -> list[str]:
    live = record.get("ended_at") is None
    left = show.span(max(0.0, record["end_at"] - now)) if live else ""
    metadata: dict[str, str] = record.get("metadata") or {}
    labels = " ".join(f"{k}={v}" for k, v in metadata.items())
    ended = "" if live else f"{show.ago(record['ended_at'], now)} ago: {record.get('cause') or ''}"
    facts = [record[name] for name in ("id", "state", "policy", "template", "tier")]
    return [*facts, show.ago(record["created_at"], now), left, labels, ended]


def kill(ids: Ids, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """End sandboxes at once; prints the id of each."""
    each(ids, lambda admin, name: admin.ask("DELETE", f"/v1/sandboxes/{name}"), as_json, url, api_key)


def pause(ids: Ids, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Stop every process of sandboxes where it is; prints the id of each."""
    each(ids, lambda admin, name: admin.ask("POST", f"/v1/sandboxes/{name}/pause"), as_json, url, api_key)


def resume(ids: Ids, as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Let paused sandboxes go on; prints the id of each."""
    each(ids, lambda admin, name: admin.ask("POST", f"/v1/sandboxes/{name}/resume"), as_json, url, api_key)


Action = Callable[["Admin", str], Awaitable[Any]]


def each(ids: list[str], action: Action, as_json: bool, url: str | None, api_key: str | None) -> None:
    """`action` on each id, as a part of a path. One that fails keeps no other from it. The exit code is the last failure's."""
    from fumehood.client.admin import piece

    async def work() -> int:
        code, done, failed = 0, list[str](), dict[str, Any]()
        async with reach.admin(url, api_key) as admin:
            for name in ids:
                try:
                    await action(admin, piece(name))
                except FumehoodError as e:
                    code, failed[name] = exits.failure_code(e), e.to_dict()
                    exits.complain(f"{show.word(name)}: {e.message}", e.cause, e.remediation)
                else:
                    done.append(name)
        if as_json:
            exits.print_json({"done": done, "failed": failed, "exit": code})
        else:
            print("\n".join(done), end="\n" if done else "")
        return code

    exits.drive(work(), as_json=as_json)
