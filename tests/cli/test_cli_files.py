"""What `--out` may create on the host (H12)."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fumehood.cli.files import Unsafe, safe_parts, write_plain


@given(st.text(max_size=80))
def test_no_guest_name_leaves_the_directory_hides_or_holds_a_control_character(tail: str) -> None:
    try:
        parts = safe_parts(f"/home/user/{tail}")
    except Unsafe:
        return
    assert parts
    for part in parts:
        assert part not in ("", ".", "..") and "/" not in part and "\0" not in part
        assert part.isprintable() and not part.startswith(".") and len(part.encode()) <= 255


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/home/user", "/home/user/../x", "/home/user/a/../../b", "/home/user/.git/hooks/x", "/home/user/a/.x",
     "relative", "", "/home/user2/x", "/home/user/\0", "/home/user/" + "x" * 256, "//home/user/x"],
)  # fmt: skip
def test_a_path_outside_the_home_or_hidden_is_refused(path: str) -> None:
    with pytest.raises(Unsafe):
        safe_parts(path)


def test_odd_names_are_made_plain() -> None:
    assert safe_parts("/home/user/a\nb/c\x1b[2J\udcff.txt") == ("a_b", "c_[2J_.txt")


def test_an_existing_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").symlink_to(victim)
    write_plain(tmp_path / "out", ("x",), b"theirs")
    assert victim.read_text() == "mine"
    assert (tmp_path / "out" / "x").read_bytes() == b"theirs" and not (tmp_path / "out" / "x").is_symlink()


def test_a_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        write_plain(tmp_path / "out", ("d", "x"), b"theirs")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_existing_fifo_does_not_hang_the_host(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    write_plain(tmp_path, ("x",), b"data")
    assert (tmp_path / "x").read_bytes() == b"data"


def test_what_is_written_is_never_executable_and_no_temporary_stays(tmp_path: Path) -> None:
    write_plain(tmp_path, ("a", "b"), b"#!/bin/sh\n")
    (tmp_path / "a" / "full").mkdir()
    with pytest.raises(OSError):
        write_plain(tmp_path, ("a", "full"), b"x")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o111 == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b", "full"]
