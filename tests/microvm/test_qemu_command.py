"""QEMU's machine has what a guest needs and nothing else, and QEMU gives up all that it does not need (H2)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fumehood.runtime.microvm.machine import MachineSpec, Place
from fumehood.runtime.microvm.qemu_command import Boot, Clone, Role, Template, Version, command, parse_version

SPEC = MachineSpec(Path("/assets/bzImage"), Path("/assets/rootfs.ext4"), "console=ttyS0, reboot=k -- quiet", 256 << 20)
PLACE = Place("m1", Path("/run/m1"), 1234)
ROLES: list[Role] = [Boot(), Clone(), Template(9)]


def told(
    role: Role, version: Version = (7, 2), accel: str = "tcg", spec: MachineSpec = SPEC, place: Place = PLACE
) -> dict[str, list[str]]:
    """The values of each option."""
    words = command(Path("/usr/bin/qemu"), version, accel, spec, place, role, 7)
    found: dict[str, list[str]] = {}
    for word, following in zip(words[1:], [*words[2:], "-"], strict=True):
        if word.startswith("-"):
            found.setdefault(word, []).extend([] if following.startswith("-") else [following])
    return found


@pytest.mark.parametrize("role", ROLES)
def test_there_is_no_device_but_a_disk_a_channel_and_a_console_and_nothing_by_default(role: Role) -> None:
    options = told(role)
    devices = {value.split(",")[0] for value in options["-device"]}
    assert devices == {"virtio-blk-device", "virtio-serial-device", "virtserialport"}
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= options.keys()
    assert not {o for o in options if o.startswith(("-net", "-nic", "-usb", "-vnc", "-spice", "-monitor", "-gdb", "-fsdev"))}
    assert options["-M"][0].startswith("microvm,") and options["-display"] == ["none"]
    assert "readonly=on" in options["-drive"][0].split(",")


@pytest.mark.parametrize("role", ROLES)
def test_no_path_of_the_host_is_named(role: Role) -> None:
    spec = replace(SPEC, initrd=Path("/assets/initrd"))
    assert "/" not in " ".join(command(Path("/usr/bin/qemu"), (7, 2), "tcg", spec, PLACE, role, 7)[1:])


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ((7, 2), {"-chroot": ["."], "-runas": ["1234:1234"]}),
        ((8, 1), {"-run-with": ["chroot=."], "-runas": ["1234:1234"]}),
        ((9, 1), {"-run-with": ["chroot=.,user=1234:1234"]}),
        ((10, 0), {"-run-with": ["chroot=.,user=1234:1234"]}),
    ],
)
def test_as_root_it_gets_a_root_directory_and_a_uid_of_its_own(version: Version, options: dict[str, list[str]]) -> None:
    found = told(Boot(), version)
    assert {o: v for o, v in found.items() if o in ("-chroot", "-runas", "-run-with")} == options
    assert found["-sandbox"] == ["on,obsolete=deny,spawn=deny,resourcecontrol=deny"]


def test_an_ordinary_user_s_can_not_change_its_uid() -> None:
    found = told(Boot(), place=replace(PLACE, uid=None))
    assert not {"-chroot", "-runas", "-run-with"} & found.keys()
    assert found["-sandbox"] == ["on,obsolete=deny,spawn=deny,resourcecontrol=deny,elevateprivileges=deny"]


@pytest.mark.parametrize(("version", "read_only"), [((7, 2), False), ((8, 1), False), ((8, 2), True), ((9, 0), True)])
def test_a_clone_never_shares_what_it_writes_and_opens_the_snapshot_for_reading_where_qemu_can(
    version: Version, read_only: bool
) -> None:
    ram = next(value for value in told(Clone(), version)["-object"] if "id=ram" in value).split(",")
    assert "share=off" in ram and ({"readonly=on", "rom=off"} <= set(ram)) == read_only


def test_the_disk_is_throttled_where_the_place_says_so() -> None:
    assert "throttling.bps-read=4096" in told(Boot(), place=replace(PLACE, read_bps=4096))["-drive"][0].split(",")
    assert "throttling" not in told(Boot())["-drive"][0]


def test_the_machine_is_the_same_whatever_its_role() -> None:
    """Else none could go on from another's state."""
    same = ("-M", "-accel", "-cpu", "-smp", "-m", "-device", "-serial", "-global")
    first, *others = ({option: told(role)[option] for option in same} for role in ROLES)
    assert others == [first, first]


def test_the_kernel_s_words_are_one_argument_and_acpi_comes_with_an_initrd() -> None:
    plain, with_initrd = told(Boot()), told(Boot(), spec=replace(SPEC, initrd=Path("/assets/initrd")))
    assert (
        plain["-append"] == ["console=ttyS0, reboot=triple -- quiet"]
        and "-initrd" not in plain
        and with_initrd["-initrd"] == ["initrd"]
    )
    assert "acpi=off" in plain["-M"][0].split(",") and "acpi=on" in with_initrd["-M"][0].split(",")


def test_translated_code_is_bounded() -> None:
    assert told(Boot())["-accel"] == ["tcg,tb-size=32"]
    assert told(Boot(), accel="kvm")["-accel"] == ["kvm"] and told(Boot(), accel="kvm")["-cpu"] == ["host"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", (7, 2)),
        ("QEMU emulator version 10.0.2", (10, 0)),
        ("qemu-img version 7.2.0", None),
        ("", None),
    ],
)
def test_versions_are_read(text: str, version: Version | None) -> None:
    assert parse_version(text) == version
