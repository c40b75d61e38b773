"""What goes into guest kernels: the fragments, the edits, the initramfs. Nothing is compiled here, no VM needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fumehood.errors import InvalidInput, SetupFailed
from fumehood.runtime.microvm import initramfs, kernel, stock
from fumehood.runtime.microvm.assets import Assets

GUEST = Path(kernel.__file__).with_name("guest")
BASE, PVM = ((GUEST / name).read_text() for name in ("base.config", "pvm.config"))

MITIGATIONS = ("CPU_MITIGATIONS", "PAGE_TABLE_ISOLATION", "RETPOLINE", "RANDOMIZE_BASE", "RANDOMIZE_MEMORY")
NEEDED = ("SMP", "CGROUPS", "MEMCG", "CGROUP_PIDS", "NAMESPACES", "SECCOMP_FILTER", "SECURITY_LANDLOCK", "OVERLAY_FS")
ABSENT = ("MODULES", "NETDEVICES", "PCI", "IO_URING", "BPF_SYSCALL", "USERFAULTFD", "DEVMEM", "KEXEC", "VSOCKETS_LOOPBACK")


def options(*texts: str) -> dict[str, str | None]:
    return {name.removeprefix("CONFIG_"): value for text in texts for name, value in kernel.settings(text)}


def test_guests_of_a_normal_host_boot_with_every_mitigation_and_no_argument_takes_one_away() -> None:
    assert {options(BASE)[name] for name in MITIGATIONS} == {"y"}
    for profile in ("small", "stock"):
        words = kernel.PROFILES[profile].boot_args.split()
        assert not [w for w in words if re.match(r"no|mitigations|clearcpuid|pti|spec|mds|tsx|l1tf", w)], words


def test_the_kernel_has_what_sandboxes_need_and_no_way_to_a_network_or_to_modules() -> None:
    assert {options(BASE)[name] for name in NEEDED} == {"y"}
    assert {options(BASE)[name] for name in ABSENT} == {None}


def test_the_pvm_fragment_only_changes_what_the_base_names_or_switches_off_and_gives_a_reason_for_each_line() -> None:
    base, pvm = options(BASE), options(PVM)
    assert [name for name, value in pvm.items() if value is not None and name not in (*base, "INIT_STACK_NONE")] == []
    lines = PVM.splitlines()
    groups = PVM[PVM.index("\n\n") :].split("\n# ")
    assert any(not g.startswith("CONFIG_") for g in groups) and lines[0].startswith("# Laid over base.config")
    before = ""
    for line in lines:
        assert not line.startswith(("CONFIG_", "# CONFIG_")) or before.startswith("#") or "CONFIG_" in before, line
        before = line


def test_pvm_is_its_own_profile_and_leaves_the_others_alone() -> None:
    assert kernel.PROFILES["small"].edits == () and "pvm.config" not in kernel.PROFILES["small"].fragments
    assert len({kernel.inputs(name) for name in kernel.PROFILES}) == len(kernel.PROFILES)


def test_an_unknown_profile_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="small, pvm, stock"):
        kernel.build_kernel(Assets(tmp_path), "big")


@pytest.mark.parametrize("text", ["", "\told\n", "old old"], ids=["absent", "another", "twice"])
def test_an_edit_that_does_not_fit_exactly_once_is_refused_and_changes_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "file.c").write_text(text)
    with pytest.raises(SetupFailed, match=r"edit of file\.c does not fit"):
        kernel.apply(tmp_path, kernel.Edit("file.c", "old" if "old old" in text else "older", "new"))
    assert (tmp_path / "file.c").read_text() == text


def test_an_edit_of_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed):
        kernel.apply(tmp_path, kernel.PVM_EDITS[0])


def test_an_edit_that_fits_is_made(tmp_path: Path) -> None:
    (tmp_path / "file.c").write_text("a old b")
    kernel.apply(tmp_path, kernel.Edit("file.c", "old", "new"))
    assert (tmp_path / "file.c").read_text() == "a new b"


def test_without_a_compiler_the_error_says_what_to_install_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SetupFailed, match="gcc") as e:
        kernel.build_kernel(Assets(tmp_path), "small")
    assert "apt-get install" in e.value.remediation
    assert list((tmp_path / "microvm/kernels").iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(4096), bytes(0x202) + b"HdrS" + bytes(4096)])
def test_what_is_no_compressed_kernel_is_not_unpacked(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bzImage").write_bytes(data)
    with pytest.raises(SetupFailed):
        stock.extract(tmp_path / "bzImage")


def read_back(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """cpio(5), "New ASCII Format", by the book."""
    found, at = dict[str, tuple[int, bytes]](), 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 109 + name_size].decode()
        at = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[at : at + size])
        at = (at + size + 3) & ~3


def test_an_initramfs_holds_what_was_put_in_and_is_the_same_each_time() -> None:
    files = {"init": (0o755, b"#!"), "bin/a": (0o644, b"12345"), "bin/empty": (0o644, b"")}
    archive = initramfs.archive(files, ("bin",))
    assert archive == initramfs.archive(dict(reversed(files.items())), ("bin",))
    expected = {name: (0o100000 | mode, data) for name, (mode, data) in files.items()}
    assert read_back(archive) == {"bin": (0o40755, b""), **expected}
