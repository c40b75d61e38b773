"""The native tier where cgroup v2 is all there is: a guest of our own runs its tests as a user with a delegated group, and as
root in a delegated unit. This file alone: make test PYTEST_ARGS="-m microvm tests/microvm/test_cgroup_v2_lane.py".
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fumehood.runtime.microvm.assets import Assets, Manifest
from lane import disks, machine
from lane.init import TESTER
from lane.machine import Ran

pytestmark = [pytest.mark.microvm, pytest.mark.root]
LIMIT_S = 1400.0  # a machine that hangs: make test runs it with what other tests leave of the processors; alone it takes 300 s
_PYTEST = ("-q", "--tb=short", "-p", "no:cacheprovider", "-p", "lane.chosen", "-o", "faulthandler_timeout=100")
# As a user what users do, and what keeps the sandbox in. As root what is root's alone, and each cgroup file by itself.
_TESTER = ("tests/lane/world.py", "tests/contract/test_contract.py")
_TESTER += tuple(f"tests/security/test_{name}.py" for name in ("barriers", "proc", "statuses", "resources"))
# Groups are made at the top, as long as nobody has left the unit: world.py comes second.
_ROOT = ("tests/native/test_cgroup.py", "tests/lane/world.py", "tests/security/test_uids.py")
RUNS = (
    {"name": TESTER, "argv": [*_PYTEST, "-m", "rootless and not root", *_TESTER]},
    {"name": "root", "argv": [*_PYTEST, "-m", "root or rootless", *_ROOT]},
)
# Fewer than these means that a selection has come to nothing.
FLOOR = {TESTER: 105, "root": 45}


@pytest.fixture(scope="module")
def ran(kernel: Callable[[str], Manifest], cached: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    root = disks.root(cached).path(disks.ROOT)
    return machine.boot(kernel("stock"), root, tmp_path_factory.mktemp("lane"), RUNS, LIMIT_S)


@pytest.mark.parametrize("who", [TESTER, "root"])
def test_the_native_tier_holds_on_cgroup_v2(who: str, ran: dict[str, Ran]) -> None:
    """H13, H15, H19; M2 to M4."""
    found = ran.get(who) or ran[""]
    assert (found.exit_code, found.bad) == (0, {}), found.summary
    assert found.passed >= FLOOR[who], found.summary
