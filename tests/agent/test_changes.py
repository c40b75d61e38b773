"""What a run has changed in the workspace: an empty one is seen to be empty by a stat(), and nothing is missed by that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fumehood.agent import changes

OLD_S = 1_000_000_000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty for some ticks of the clock."""
    monkeypatch.setattr(changes, "_TICK_S", 0.02)
    os.utime(tmp_path, (OLD_S, OLD_S))
    time.sleep(0.05)
    return tmp_path


@pytest.fixture
def workspace(home: Path) -> changes.Workspace:
    seen_empty = changes.Workspace(str(home))
    assert seen_empty.scan() == changes.Scan({}, truncated=False)
    return seen_empty


def test_an_empty_workspace_is_not_walked_again(workspace: changes.Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "scan", lambda home: pytest.fail("walked"))
    assert workspace.scan() == changes.Scan({}, truncated=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda home: (home / "new").write_text("x"),
        lambda home: (home / "new").symlink_to("/nowhere"),
        lambda home: [(home / "sub").mkdir(), (home / "sub/new").write_text("x")],
        lambda home: [(home / "new").write_text("x"), os.utime(home, (OLD_S, OLD_S))],
        lambda home: [os.rename(home, home.with_name("old")), home.mkdir(), (home / "new").write_text("x")],
    ],
    ids=["file", "link", "below a directory", "mtime put back", "another directory"],
)
def test_whatever_comes_into_an_empty_workspace_is_seen(
    workspace: changes.Workspace, home: Path, change: Callable[[Path], object]
) -> None:
    change(home)
    assert [Path(path).name for path in workspace.scan().files] == ["new"]


def test_what_changes_within_a_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """Its directory may have the same time stamp before and after."""
    workspace = changes.Workspace(str(tmp_path))
    assert not workspace.scan().files
    before = os.stat(tmp_path)
    (tmp_path / "new").write_text("x")
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(workspace.scan().files) == 1


def test_a_workspace_with_a_directory_is_walked_each_time(home: Path) -> None:
    (home / "sub").mkdir()
    os.utime(home, (OLD_S, OLD_S))
    workspace = changes.Workspace(str(home))
    assert not workspace.scan().files
    (home / "sub/new").write_text("x")
    assert len(workspace.scan().files) == 1
