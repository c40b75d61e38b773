"""The same service on Firecracker, which resets the guest's connections at each snapshot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import service_home

from fumehood.errors import Detached
from fumehood.lease import Lease
from fumehood.model import MIB, CodeRequest
from fumehood.runtime.microvm.assets import Assets
from fumehood.service import CreateAsk, Service
from service.opened import ME, config, held

pytestmark = [pytest.mark.microvm, pytest.mark.root]
SMALL = CreateAsk(limits={"memory_bytes": 128 * MIB, "timeout_s": 300, "lifetime_s": 3000})
BOOT_S = 1500.0  # of a guest whose kernel is emulated, on a busy machine
PATIENT: dict[str, Any] = {"agent_timeout_s": 120.0, "microvm_boot_timeout_s": BOOT_S, "flush_records": True}
TICKS = ["sh", "-c", "while :; do echo tick; sleep 0.5; done"]


@pytest.fixture(scope="module")
def home(cached: Assets, image: Callable[[str], Any], kernel: Callable[[str], Any], firecracker: Path) -> Path:
    image("python")
    kernel("pvm")
    return service_home.made(cached, "firecracker", ["pvm"], firecracker=str(firecracker), microvm_boot_timeout_s=BOOT_S)


async def text(service: Service, lease: Lease, code: str) -> str | None:
    result = await service.run(ME, lease, CodeRequest(code))
    assert result.ok, result
    return result.text


async def test_a_machine_is_copied_forked_and_rolled_back_and_its_link_comes_back_each_time(
    home: Path, firecracker: Path
) -> None:
    settings = config(home, "firecracker", firecracker=str(firecracker), **PATIENT)
    async with await Service.open(settings) as service:
        lease = await service.create(ME, SMALL)
        await text(service, lease, "x = 'then'")
        ticking = await lease.live.link.open("exec.start", argv=TICKS, env={}, stdin=False)
        pid = (await anext(aiter(ticking))).json()["pid"]
        kept = await service.snapshot(ME, lease)
        with pytest.raises(Detached):
            await ticking.result()
        again = await lease.live.link.open("exec.attach", pid=pid)
        async for frame in again:
            if b"tick" in frame.payload:
                break
        again.abandon()
        await text(service, lease, "x = 'since'")

        forks = await service.fork(ME, lease, 2)
        for fork in [*forks, lease]:
            assert await text(service, fork, "x") == "'since'"
            assert pid in [p["pid"] for p in (await fork.live.link.call("exec.list"))["processes"]]
        for fork in forks:
            await service.kill(ME, fork)

        await service.pause(ME, lease)
        await service.discard(ME, (await service.snapshot(ME, lease)).id)
        await service.resume(ME, lease)
        assert await text(service, lease, "x") == "'since'"

        await service.rollback(ME, lease, kept.id)
        assert await text(service, lease, "x") == "'then'"
        await service.kill(ME, lease)
        restored = await service.restore(ME, kept.id)
        assert await text(service, restored, "x") == "'then'"
        await service.kill(ME, restored)
        await service.discard(ME, kept.id)
        assert held(service) == {} and service.supervisor.snapshots("firecracker") == []
