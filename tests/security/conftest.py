"""The native tier as whoever runs the suite: `make test` runs the tests marked `rootless` a second time as a user."""

from collections.abc import Iterator

import pytest

from fumehood import Sandbox


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(tier="native") as sandbox:
        yield sandbox
