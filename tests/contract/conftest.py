"""Every tier passes the same suite: fake, and native as whoever runs it (`make test` runs it as root and as a user)."""

from collections.abc import Iterator

import pytest

from fumehood import Sandbox


@pytest.fixture(params=["native", "fake"])
def tier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def box(tier: str) -> Iterator[Sandbox]:
    with Sandbox(tier=tier) as sandbox:
        yield sandbox
