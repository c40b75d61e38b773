"""The contract that every tier keeps, on the microVM tiers: the same tests as in tests/contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hostile
import pytest

from fumehood import Sandbox

pytest.register_assert_rewrite("contract.test_contract")
from contract.test_contract import *  # noqa: E402, F403

pytestmark = [pytest.mark.microvm, pytest.mark.root]


@pytest.fixture(scope="module", params=hostile.TIERS)
def where(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    with hostile.engine(request, request.param):
        yield {"tier": request.param, "url": ""}


@pytest.fixture
def box(where: dict[str, Any]) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox
