"""What there is, asked for without a sandbox: a server's sandboxes; the snapshots of a server or of this host."""

from __future__ import annotations

from fumehood.client import snapshots
from fumehood.client.address import Address
from fumehood.client.engine import Engine
from fumehood.client.snapshots import Snapshot
from fumehood.errors import InvalidInput
from fumehood.records import SandboxRecord

# remote is imported late: HTTP costs 0.1 s at import, which nobody pays who embeds.


async def there(engine: Engine, url: str | None, api_key: str | None, state: str | None, limit: int) -> list[SandboxRecord]:
    from fumehood.client.remote import sandboxes

    return await sandboxes(engine, server(engine, url, api_key), state, limit)


async def kept(
    engine: Engine, url: str | None, api_key: str | None, tier: str, sandbox_id: str | None, limit: int
) -> list[Snapshot]:
    address = Address.of(engine.supervisor.config, url, api_key)
    if address is not None:
        from fumehood.client.remote import snapshots as served

        return await served(engine, address, sandbox_id, limit)
    found = map(snapshots.of_this_host, engine.supervisor.snapshots(tier))
    mine = [snapshot for snapshot in found if sandbox_id in (None, snapshot.sandbox_id)]
    return sorted(mine, key=lambda snapshot: snapshot.created_at, reverse=True)[:limit]


async def discard(engine: Engine, url: str | None, api_key: str | None, tier: str, snapshot_id: str) -> None:
    snapshots.check_id(snapshot_id)
    address = Address.of(engine.supervisor.config, url, api_key)
    if address is None:
        await engine.supervisor.discard(snapshot_id, tier)
        engine.kept_specs.pop(snapshot_id, None)
        return
    from fumehood.client.remote import discard as served

    await served(engine, address, snapshot_id)


def server(engine: Engine, url: str | None, api_key: str | None) -> Address:
    """Raises InvalidInput when neither the call nor the configuration names one."""
    address = Address.of(engine.supervisor.config, url, api_key)
    if address is None:
        raise InvalidInput("no server is named", cause="sandboxes of this process have no list", remediation="pass url=")
    return address
