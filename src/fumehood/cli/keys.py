"""`fumehood keys`: who may call the server. Works on the store's file, so with or without a running server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from fumehood.cli import exits, show
from fumehood.cli.reach import JsonOption
from fumehood.errors import InvalidInput, NotFound
from fumehood.model import check_id
from fumehood.records import SCOPES, ApiKey, KeyLimits

if TYPE_CHECKING:
    from fumehood.store import Store

app = typer.Typer(help="API keys: make, list, revoke. They are kept as digests and shown once.", no_args_is_help=True)
_DEFAULT = KeyLimits()


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose: tenants never see each other.")] = "local",
    name: Annotated[str, typer.Option(help="A note for keys list.")] = "",
    scope: Annotated[list[str] | None, typer.Option("--scope", help="sandboxes (default) or admin (repeatable).")] = None,
    requests_per_s: Annotated[
        float, typer.Option(help="Requests each second, on average.", min=0.01)
    ] = _DEFAULT.requests_per_s,
    burst: Annotated[int, typer.Option(help="Requests at once after a quiet time.", min=1)] = _DEFAULT.burst,
    concurrent: Annotated[int, typer.Option(help="Requests under way.", min=1)] = _DEFAULT.concurrent_requests,
    sandboxes: Annotated[int, typer.Option(help="Sandboxes at once; 0: the server's own bound.", min=0)] = _DEFAULT.sandboxes,
    priority: Annotated[int, typer.Option(help="-10 (last) to 10 (first) in the queue.", min=-10, max=10)] = _DEFAULT.priority,
    compat: Annotated[list[str] | None, typer.Option("--compat", help="An E2B switch of docs/e2b.md (repeatable).")] = None,
    e2b: Annotated[bool, typer.Option("--e2b", help="Write it as the E2B SDK wants it: e2b_...")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a key for the server of this state directory and print it: the only time that its secret is shown."""

    async def work() -> int:
        from fumehood.store.keys import mint, public

        limits = KeyLimits(requests_per_s, burst, concurrent, sandboxes, priority)
        whose, switches = check_id(tenant, "--tenant"), frozenset(compat or ())
        text, key = mint(whose, _scopes(scope), name, limits, switches, "e2b" if e2b else "fh")
        async with _store() as store:
            await store.add_key(key)
        if as_json:
            exits.print_json({"api_key": text, **public(key)})
        else:
            print(text)
        return 0

    exits.drive(work(), as_json=as_json)


@app.command(name="list")
def list_(
    tenant: Annotated[str | None, typer.Option(help="Of this one only.")] = None,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Revoked ones too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List keys; their secrets are kept nowhere."""

    async def work() -> int:
        from fumehood.store.keys import public

        async with _store() as store:
            keys = [k for k in await store.keys(tenant) if everything or k.revoked_at is None]
        if as_json:
            exits.print_json({"keys": [public(k) for k in keys]})
        else:
            rows = [(k.id, k.tenant, k.name, ",".join(sorted(k.scopes)), show.clock(k.created_at), _state(k)) for k in keys]
            show.table(["id", "tenant", "name", "scopes", "made", "state"], rows)
        return 0

    exits.drive(work(), as_json=as_json)


@app.command()
def revoke(
    key_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="As keys list shows them.")], as_json: JsonOption = False
) -> None:
    """Revoke keys; a running server refuses them within two seconds."""

    async def work() -> int:
        async with _store() as store:
            unknown = [k for k in key_ids if not await store.revoke_key(k)]
        if unknown:
            raise NotFound(
                f"not revoked: {', '.join(map(show.word, unknown))}",
                cause="there is no such key, or it was revoked before",
                remediation="see fumehood keys list --all",
            )
        if as_json:
            exits.print_json({"revoked": key_ids})
        return 0

    exits.drive(work(), as_json=as_json)


def _scopes(asked: list[str] | None) -> frozenset[str]:
    found = frozenset(asked or ["sandboxes"])
    if unknown := found - frozenset[str](SCOPES):
        raise InvalidInput(f"bad --scope {min(unknown)!r}", cause="no such scope", remediation=f"known: {', '.join(SCOPES)}")
    return found


@asynccontextmanager
async def _store() -> AsyncGenerator[Store]:
    from fumehood.config import Config
    from fumehood.store import Store

    store = await Store.open(Config.load().state_dir / "store.db", exclusive=False)
    try:
        yield store
    finally:
        await store.aclose()


def _state(key: ApiKey) -> str:
    return "valid" if key.revoked_at is None else f"revoked {show.ago(key.revoked_at)} ago"
