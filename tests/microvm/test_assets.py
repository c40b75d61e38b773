"""Published directories appear whole or not at all, and nothing damaged is ever handed out. No VM needed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from fumehood.errors import CapacityExceeded, InvalidInput, SetupFailed
from fumehood.runtime.microvm import assets as module
from fumehood.runtime.microvm.assets import MANIFEST, Assets

pytestmark = pytest.mark.rootless


def making(**files: bytes) -> Callable[[Path], Mapping[str, Any]]:
    def make(directory: Path) -> Mapping[str, Any]:
        for name, data in files.items():
            (directory / name).write_bytes(data)
        return {"count": len(files)}

    return make


@pytest.fixture
def assets(tmp_path: Path) -> Assets:
    return Assets(tmp_path)


def leftovers(assets: Assets) -> list[str]:
    return [p.name for p in assets.directory("images", "x").parent.iterdir() if p.name.startswith(".")]


def test_what_was_published_is_loaded_again(assets: Assets) -> None:
    made = assets.publish("images", "x", making(rootfs=b"abc", other=b""))
    assert assets.load("images", "x") == assets.load("images", "x", thorough=True) == made
    assert made.path("rootfs").read_bytes() == b"abc"
    assert made.facts == {"count": 2} and list(assets.all("images")) == [made] and not leftovers(assets)


def test_only_this_user_can_enter_the_directories(assets: Assets) -> None:
    made = assets.publish("kernels", "x", making(vmlinux=b"abc"))
    assert made.directory.stat().st_mode & 0o077 == 0 and made.directory.parent.stat().st_mode & 0o077 == 0


def test_a_new_one_replaces_the_old_and_open_files_of_the_old_go_on(assets: Assets) -> None:
    old = assets.publish("images", "x", making(rootfs=b"old"))
    with old.path("rootfs").open("rb") as file:
        new = assets.publish("images", "x", making(rootfs=b"new"))
        assert file.read() == b"old"
    assert assets.load("images", "x") == new and new.digest != old.digest and not leftovers(assets)


def test_the_digest_depends_on_contents_alone(assets: Assets) -> None:
    one, two = (assets.publish("images", name, making(rootfs=b"abc")) for name in ("one", "two"))
    assert one.digest == two.digest


def test_a_failure_in_the_making_leaves_the_old_one_and_no_rubbish(assets: Assets) -> None:
    old = assets.publish("images", "x", making(rootfs=b"old"))

    def fail(directory: Path) -> Mapping[str, Any]:
        (directory / "rootfs").write_bytes(b"half")
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError):
        assets.publish("images", "x", fail)
    assert assets.load("images", "x") == old and not leftovers(assets)


def test_too_little_space_is_refused_before_anything_is_made(assets: Assets) -> None:
    def never(_: Path) -> Mapping[str, Any]:
        raise AssertionError("made though there is no room")

    with pytest.raises(CapacityExceeded) as e:
        assets.publish("snapshots", "x", never, need_bytes=1 << 60)
    assert e.value.remediation and not assets.directory("snapshots", "x").exists()


def test_a_disk_that_fills_up_in_the_middle_is_a_typed_error_and_leaves_nothing(assets: Assets) -> None:
    def fill(directory: Path) -> Mapping[str, Any]:
        (directory / "memory").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CapacityExceeded):
        assets.publish("images", "x", fill)
    assert not leftovers(assets) and not assets.directory("images", "x").exists()


def damage_cut(path: Path) -> None:
    os.truncate(path / "rootfs", 2)


def damage_contents(path: Path) -> None:
    (path / "rootfs").write_bytes(b"abd")


def damage_gone(path: Path) -> None:
    (path / "rootfs").unlink()


def damage_manifest_cut(path: Path) -> None:
    os.truncate(path / MANIFEST, 30)


def damage_manifest_not_an_object(path: Path) -> None:
    (path / MANIFEST).write_text("[]")


def damage_manifest_binary(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"\xff\xfe")


def damage_format(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({**json.loads((path / MANIFEST).read_text()), "format": 99}))


def damage_another_name(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"x"', '"y"'))


def damage_stamp(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace('"sha256"', '"sha"'))


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_nothing_damaged_is_handed_out_and_the_error_says_what_to_run(assets: Assets, damage: Callable[[Path], None]) -> None:
    damage(assets.publish("images", "x", making(rootfs=b"abc")).directory)
    with pytest.raises(SetupFailed) as e:
        assets.load("images", "x")
    assert e.value.cause and e.value.remediation.startswith("run: fumehood image build x, or")
    assert [type(found) for found in assets.all("images")] == [SetupFailed]


def test_damage_that_keeps_size_inode_and_time_is_found_when_asked_thoroughly(assets: Assets) -> None:
    path = assets.publish("images", "x", making(rootfs=b"abc")).path("rootfs")
    before = path.stat()
    path.write_bytes(b"abd")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assets.load("images", "x")
    with pytest.raises(SetupFailed):
        assets.load("images", "x", thorough=True)


def test_a_copy_of_the_directory_is_as_good(assets: Assets, tmp_path: Path) -> None:
    made = assets.publish("images", "x", making(rootfs=b"abc"))
    os.rename(made.directory, tmp_path / "aside")
    subprocess.run(["cp", "-r", tmp_path / "aside", made.directory], check=True)
    assert assets.load("images", "x").files["rootfs"].sha256 == made.files["rootfs"].sha256


def test_a_missing_asset_says_what_makes_it(assets: Assets) -> None:
    with pytest.raises(SetupFailed) as e:
        assets.load("kernels", "pvm")
    assert e.value.remediation == "run: fumehood image kernel --profile pvm"
    assert list(assets.all("kernels")) == []


def test_a_file_that_the_asset_lacks_is_an_error(assets: Assets) -> None:
    with pytest.raises(SetupFailed):
        assets.publish("kernels", "x", making(vmlinux=b"")).path("bzImage")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "-x", ".making-x", "x\n", "x" * 65])
def test_a_name_never_leads_out_of_its_directory(assets: Assets, name: str) -> None:
    with pytest.raises(InvalidInput):
        assets.directory("images", name)


def test_an_unknown_kind_is_refused(assets: Assets) -> None:
    with pytest.raises(InvalidInput):
        assets.directory("secrets", "x")


def test_removing_is_complete_and_idempotent(assets: Assets) -> None:
    assets.publish("images", "x", making(rootfs=b"abc"))
    assets.remove("images", "x")
    assets.remove("images", "x")
    assert list(assets.directory("images", "x").parent.iterdir()) == []


DIE = """
import os, sys
from pathlib import Path
from fumehood.runtime.microvm.assets import Assets
def make(directory):
    (directory / "rootfs").write_bytes(b"half")
    print("making", flush=True)
    sys.stdin.read()
    os._exit(9)
Assets(Path(sys.argv[1])).publish("images", "x", make)
"""


def test_what_a_killed_maker_left_goes_with_the_next_publish_and_a_living_makers_does_not(
    assets: Assets, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", DIE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as maker:
        assert maker.stdout and maker.stdout.readline() == b"making\n"
        assets.publish("images", "y", making(rootfs=b"abc"))
        assert len(leftovers(assets)) == 1
        maker.kill()
    assert len(leftovers(assets)) == 1
    assets.publish("images", "y", making(rootfs=b"abc"))
    assert not leftovers(assets) and not assets.directory("images", "x").exists()


def test_the_reserve_is_kept(assets: Assets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(CapacityExceeded):
        assets.publish("images", "x", making(rootfs=b"abc"))
