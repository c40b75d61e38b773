"""What a guest's kernel did to user code is told with the result that it decided, and with no other (H21)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hostile
import machines
import pytest
from hostile import LIMITS

from fumehood import Sandbox
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.image import ROOTFS

pytestmark = [pytest.mark.microvm, pytest.mark.root]
Find = Callable[[str], Manifest]
FILL = "kept = []\nwhile True: kept.append(bytearray(b'x') * (1 << 20))"


def test_who_is_killed_for_memory_before_its_limit_was_reached_is_accounted_for(
    kernel: Find, image: Find, tmp_path: Path
) -> None:
    """The machine, not the group of user code, runs out of it: what PID 1 has is on nobody's account, copies of files too."""
    with machines.qemu(kernel("stock"), image("python").path(ROOTFS), tmp_path, "fumehood.prestart=python") as guest:
        guest.connect()
        assert guest.call("bind", env={}, limits={"disk_bytes": 256 << 20}).ok == {}
        assert guest.run("open('big', 'wb').write(bytes(100 << 20))").account["oom_kills"] == 0
        assert guest.call("context.checkpoint", id="python").ok
        assert guest.run(FILL).account["oom_kills"] == 1
        most, peak = (int(guest.sh(f"cat /sys/fs/cgroup/user/memory.{name}").stdout) for name in ("max", "peak"))
        assert peak < most - (16 << 20), "else it was its limit that it met, and this shows nothing"


@pytest.mark.parametrize("tier", ["qemu"])  # another would differ in nothing of this
def test_what_befell_the_one_it_was_copied_from_is_not_told_as_the_copy_s(request: pytest.FixtureRequest, tier: str) -> None:
    with hostile.engine(request, tier), Sandbox(tier=tier, url="", limits=LIMITS) as box:
        assert box.run(FILL).status == "oom"
        (fork,) = box.fork(1)
        with fork:
            assert fork.run("1 / 0").status == "error"
            assert fork.run(FILL).status == "oom", "its own still is"
        assert box.run("1 / 0").status == "error"
