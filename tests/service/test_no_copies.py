"""Where the tier copies no sandboxes: said so before anything is taken, and no record or sandbox is the worse for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from opened import ME, OTHER, held, opened

from fumehood.errors import FumehoodError, NotFound, ProtectionUnavailable, Unsupported
from fumehood.lease import Lease
from fumehood.model import CodeRequest, SandboxState
from fumehood.policy.resolve import resolve
from fumehood.records import SnapshotRecord, SnapshotState
from fumehood.service import CreateAsk, Service, spec_json
from fumehood.store import Store

pytestmark = pytest.mark.rootless
ID = "p" + "0" * 16


def record(number: int = 0, state: SnapshotState = "ready", tier: str = "qemu", tenant: str = "one") -> SnapshotRecord:
    spec = resolve("default")
    words = (spec.template.name, spec.policy_name, spec.policy_hash, spec_json.to_text(spec))
    return SnapshotRecord(f"p{number:016x}", tenant, "key1", "s" + "0" * 16, tier, *words, state, 5.0, 7)


async def keep(home: Path, *records: SnapshotRecord) -> None:
    """As a server left them."""
    (home / "state").mkdir(mode=0o700, exist_ok=True)
    store = await Store.open(home / "state/store.db")
    for each in records:
        await store.snapshots.put(each)
    await store.aclose()


CALLS: dict[str, Callable[[Service, Lease], Awaitable[Any]]] = {
    "snapshot": lambda service, lease: service.snapshot(ME, lease),
    "fork": lambda service, lease: service.fork(ME, lease, 2),
    "rollback": lambda service, lease: service.rollback(ME, lease, ID),
    "supervisor.snapshot": lambda service, lease: service.supervisor.snapshot(lease.live),
    "supervisor.fork": lambda service, lease: service.supervisor.fork(lease.live, 2),
    "supervisor.rollback": lambda service, lease: service.supervisor.rollback(lease.live, ID),
    "supervisor.restore": lambda service, lease: service.supervisor.restore(ID, lease.live.spec),
    "supervisor.discard": lambda service, lease: service.supervisor.discard(ID),
}


@pytest.mark.parametrize("tier", ["native", "fake"])
async def test_it_names_the_tiers_that_can_and_the_sandbox_goes_on(tmp_path: Path, tier: str) -> None:
    async with opened(tmp_path, tier) as service:
        lease = await service.create(ME, CreateAsk())
        before = held(service)
        for name, call in CALLS.items():
            with pytest.raises(Unsupported) as e:
                await call(service, lease)
            assert tier in e.value.cause and "firecracker or qemu" in e.value.remediation, name
        assert held(service) == before and lease.live.state is SandboxState.READY
        assert (await service.run(ME, lease, CodeRequest("6 * 7"))).text == "42"
        assert await service.snapshots(ME) == [] and len(service.leases(ME)) == 1


async def test_records_of_a_tier_that_can_not_be_had_now_are_kept_as_they_are(tmp_path: Path) -> None:
    """Its files may well be there, and the monitor be installed again tomorrow."""
    await keep(tmp_path, record(0), record(1, "making"), record(2, tier="native"))
    async with opened(tmp_path, "fake") as service:
        assert [r.id for r in await service.snapshots(ME)] == [record(2).id, record(0).id]
        assert (await service.store.snapshots.one("one", record(1).id)) == record(1, "making")
        with pytest.raises(ProtectionUnavailable):
            await service.restore(ME, record(0).id)
        with pytest.raises(ProtectionUnavailable):
            await service.discard(ME, record(0).id)
        assert held(service) == {} and len(await service.snapshots(ME)) == 2


async def words(call: Awaitable[Any]) -> str:
    with pytest.raises(NotFound) as e:
        await call
    return f"{e.value.code} {e.value} {e.value.remediation} {e.value.details}"


async def test_another_tenants_and_half_made_ones_are_unknown_in_the_same_words(tmp_path: Path) -> None:
    await keep(tmp_path, record(1), record(2, "making", tenant="two"), record(3, "making", tenant="one"))
    async with opened(tmp_path, "fake") as service:
        assert await service.snapshots(OTHER) == [] == await service.snapshots(ME, sandbox_id="s" + "1" * 16)
        for call in (service.snapshot_of, service.discard, service.restore):
            unknown = await words(call(OTHER, f"p{9:016x}"))
            for number in (1, 2, 3):
                said = await words(call(OTHER, record(number).id))
                assert said.replace(record(number).id, f"p{9:016x}") == unknown
        assert (await service.snapshot_of(ME, record(1).id)).sandbox_id == record().sandbox_id


async def test_a_count_of_forks_out_of_range_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, "fake") as service:
        lease = await service.create(ME, CreateAsk())
        for count in (0, -1, 65):
            with pytest.raises(FumehoodError):
                await service.supervisor.fork(lease.live, count)
