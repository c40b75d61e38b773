"""The contract that every tier keeps, on the microVM tiers: the same tests as in tests/contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ahead
import proven
import pytest

from fumehood import Sandbox

pytest.register_assert_rewrite("contract.test_contract")
from contract.test_contract import *  # noqa: E402, F403

pytestmark = [pytest.mark.microvm, pytest.mark.root]


@pytest.fixture(scope="module", params=["qemu", "firecracker"])
def where(
    request: pytest.FixtureRequest, kernel: Callable[[str], Any], image: Callable[[str], Any]
) -> Iterator[dict[str, Any]]:
    is_kvm = request.param == "firecracker"
    settings = {"FUMEHOOD_FIRECRACKER": str(request.getfixturevalue("firecracker"))} if is_kvm else {}
    image("python")
    kernel("pvm" if is_kvm else "stock")
    with proven.engine(ahead.STATE, request.param, **settings):
        yield {"tier": request.param, "url": ""}


@pytest.fixture
def box(where: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox
