"""The native tier as whoever runs the suite: `make test` runs the tests marked `rootless` a second time as a user."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood import Sandbox


@pytest.fixture
def box() -> Iterator[Sandbox]:
    with Sandbox(tier="native") as sandbox:
        yield sandbox


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory of the host's that anybody may write, seen from the file system alone."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o005 != 0o005:
            directory.chmod(0o755)
    target = tmp_path / "shared"
    target.mkdir()
    target.chmod(0o777)
    (target / "file").write_text("host")
    (target / "file").chmod(0o666)
    return target


@pytest.fixture(scope="module")
def shared_box() -> Iterator[Sandbox]:
    """One for many attacks that leave no trace."""
    with Sandbox(tier="native", limits={"lifetime_s": 300}) as sandbox:
        yield sandbox
