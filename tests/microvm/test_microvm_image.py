"""Guest images: the same inputs make the same bytes, nothing dangerous gets in, and what is missing is said. No VM needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fumehood.agent import wire
from fumehood.errors import InvalidInput, SetupFailed
from fumehood.runtime.microvm import ext4, image, rootfs
from fumehood.runtime.microvm.assets import Assets, Manifest

pytestmark = pytest.mark.rootless
PATH = f"{os.defpath}:/usr/sbin:/sbin"


def debugfs(image: Path, request: str) -> str:
    command = ["debugfs", "-R", request, str(image)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": PATH, "TZ": "UTC"}).stdout


def a_root(path: Path, backwards: bool = False) -> Path:
    """A tiny root file system, as if unpacked by somebody."""
    files = {"usr/bin/python3.11": b"#!", "etc/motd": b"hello", "srv/a": b"a" * 9000, "srv/b": b"", "srv/c/d": b"d"}
    for name in sorted(files, reverse=backwards):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(files[name])
    (path / "usr/bin/python3").symlink_to("python3.11")
    return path


def build(tmp_path: Path, source: Path, state: str = "state") -> Manifest:
    return image.build_image(Assets(tmp_path / state), "mine", rootfs.from_directory(source))


def test_the_same_files_make_the_same_bytes_whenever_and_in_whatever_order_they_came(tmp_path: Path) -> None:
    one, two = a_root(tmp_path / "one"), a_root(tmp_path / "two", backwards=True)
    for path in two.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    made = [build(tmp_path, source, state) for source, state in ((one, "s1"), (two, "s2"))]
    assert made[0].digest == made[1].digest
    (two / "etc/motd").write_bytes(b"hallo")
    assert build(tmp_path, two).digest != made[0].digest


def test_the_file_system_is_sound_and_holds_what_was_put_in(tmp_path: Path) -> None:
    rootfs_image = build(tmp_path, a_root(tmp_path / "root")).path(image.ROOTFS)
    subprocess.run(["e2fsck", "-fn", rootfs_image], check=True, capture_output=True, env={"PATH": PATH})
    assert debugfs(rootfs_image, "cat /srv/a") == "a" * 9000 and debugfs(rootfs_image, "cat /srv/c/d") == "d"


def test_everything_in_it_belongs_to_root_and_has_one_time(tmp_path: Path) -> None:
    rootfs_image = build(tmp_path, a_root(tmp_path / "root")).path(image.ROOTFS)
    for name in ("/", "/srv/a", "/home/user", "/sbin/init", "/opt/fumehood/fumehood/agent/guest.py"):
        shown = debugfs(rootfs_image, f"stat {name}")
        assert "User:     0   Group:     0" in shown, shown
        assert {line.split(" -- ")[1] for line in shown.splitlines() if "time:" in line} == {"Sun Sep  9 01:46:40 2001"}


def test_set_user_id_bits_sockets_and_fifos_of_the_source_stay_out(tmp_path: Path) -> None:
    source = a_root(tmp_path / "root")
    (source / "srv/a").chmod(0o6755)
    os.mkfifo(source / "srv/fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source / "srv/socket"))
    rootfs_image = build(tmp_path, source).path(image.ROOTFS)
    assert "Mode:  0755" in debugfs(rootfs_image, "stat /srv/a")
    names = debugfs(rootfs_image, "ls -p /srv")
    assert "/fifo/" not in names and "/socket/" not in names and "/a/" in names


def test_the_agent_in_it_is_ours_with_byte_code_and_init_names_its_python(tmp_path: Path) -> None:
    made = build(tmp_path, a_root(tmp_path / "root"))
    rootfs_image = made.path(image.ROOTFS)
    source = Path(wire.__file__).read_text()
    assert debugfs(rootfs_image, "cat /opt/fumehood/fumehood/agent/wire.py") == source
    assert debugfs(rootfs_image, "cat /sbin/init").startswith("#!/usr/bin/python3 -I\n")
    assert made.facts == {"python": "3.11", "generation": wire.GENERATION, "agent": image.agent_digest()}
    compiled = debugfs(rootfs_image, "ls -p /opt/fumehood/fumehood/agent/__pycache__")
    assert ("wire.cpython-311.pyc" in compiled) == (sys.version_info[:2] == (3, 11))


def test_links_of_the_source_lead_nothing_of_ours_out_of_the_image(tmp_path: Path) -> None:
    source, victim = a_root(tmp_path / "root"), tmp_path / "victim"
    victim.write_text("mine")
    (source / "etc/passwd").symlink_to(victim)
    (source / "etc/machine-id").symlink_to(victim)
    rootfs_image = build(tmp_path, source).path(image.ROOTFS)
    assert victim.read_text() == "mine"
    assert "user:x:1000" in debugfs(rootfs_image, "cat /etc/passwd")


@pytest.mark.parametrize("name", ["etc", "sbin", "opt", "opt/fumehood", "var", "home"])
def test_a_directory_that_is_a_link_out_of_the_root_is_refused(tmp_path: Path, name: str) -> None:
    source, outside = a_root(tmp_path / "root"), tmp_path / "outside"
    outside.mkdir()
    if (source / name).exists():
        (source / name).rename(source / "aside")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(outside)
    with pytest.raises(SetupFailed, match="leads out of it"):
        build(tmp_path, source)
    assert list(outside.iterdir()) == []


def test_a_root_without_python_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "root/etc").mkdir(parents=True)
    with pytest.raises(SetupFailed, match="no Python 3"):
        build(tmp_path, tmp_path / "root")
    assert list((tmp_path / "state/microvm/images").iterdir()) == []


def test_a_directory_that_is_not_there_is_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        build(tmp_path, tmp_path / "nothing")


def test_an_unknown_name_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="data-analysis"):
        image.build_image(Assets(tmp_path), "nothing")


def test_a_library_that_is_not_installed_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="no-such-thing is not installed here") as e:
        image.build_image(Assets(tmp_path), "mine", rootfs.from_host("no-such-thing"))
    assert e.value.remediation


def test_without_e2fsprogs_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SetupFailed, match="mke2fs") as e:
        build(tmp_path, a_root(tmp_path / "root"))
    assert "e2fsprogs" in e.value.remediation


def test_progress_is_told(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    source = rootfs.from_directory(a_root(tmp_path / "root"))
    image.build_image(Assets(tmp_path), "mine", source, lambda *step: steps.append(step))
    assert len({text for text, _, _ in steps}) >= 2 and all(0 <= done <= total for _, done, total in steps)
