"""M1, M4 of the boundary: after the drop, uid 0 is an ordinary user for good."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cell import call, in_child

from fumehood.runtime.native import capabilities, syscalls

SETS = ("effective", "permitted", "inheritable", "bounding", "ambient")
SLASH = ctypes.create_string_buffer(b"/")


def dropped(probe: Callable[[], Any], on: bool = True, nnp: bool = True) -> Any:
    def body() -> Any:
        if nnp:
            capabilities.no_new_privs()
        if on:
            capabilities.drop_all()
        return probe()

    return in_child(body).report


@pytest.mark.root
def test_all_five_sets_are_empty_and_locked() -> None:
    before, after = capabilities.current(), dropped(capabilities.current)
    assert before["effective"] and before["bounding"], "without the drop there is something to drop"
    assert {name: after[name] for name in SETS} == dict.fromkeys(SETS, 0)
    assert after["securebits"] == 0xEF and after["no_new_privs"] == 1


@pytest.mark.root
@pytest.mark.parametrize(
    "name, args",
    [
        ("chroot", (ctypes.addressof(SLASH),)),
        ("unshare", (syscalls.NEWNS,)),
        ("setpriority", (0, 0, -5 & 0xFFFFFFFF)),
    ],
)
def test_root_without_capabilities_is_refused_what_needs_them(name: str, args: tuple[int, ...]) -> None:
    assert dropped(lambda: call(name, *args)) in (-errno.EPERM, -errno.EACCES)
    assert dropped(lambda: call(name, *args), on=False) in (0, -errno.EFAULT)


@pytest.mark.root
def test_a_program_started_as_root_gets_nothing_back() -> None:
    """Not even with no_new_privs off: the securebits say that uid 0 means nothing."""

    def effective() -> str:
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        return next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))

    assert int(dropped(effective, nnp=False), 16) == 0
    assert int(dropped(effective, on=False, nnp=False), 16) != 0


@pytest.mark.root
def test_a_set_user_id_program_changes_nothing_under_no_new_privs(tmp_path: Path) -> None:
    program = tmp_path / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    for directory in (tmp_path, *tmp_path.parents):
        if str(directory).startswith("/tmp/pytest"):
            directory.chmod(0o755)

    def effective_uid() -> str:
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
        return subprocess.run([str(program), "-u"], capture_output=True, text=True, check=True).stdout.strip()

    assert dropped(effective_uid, on=False, nnp=True) == "12345"
    assert dropped(effective_uid, on=False, nnp=False) == "0"


def test_an_ordinary_user_without_setpcap_drops_what_it_has_only_under_no_new_privs() -> None:
    def body(nnp: bool) -> Any:
        if os.getuid() == 0:
            os.setresuid(12345, 12345, 12345)
        if nnp:
            capabilities.no_new_privs()
        try:
            capabilities.drop_all()
            return capabilities.current()["effective"]
        except PermissionError:
            return "refused"

    assert in_child(lambda: body(True)).report == 0
    assert in_child(lambda: body(False)).report == "refused"


def test_the_drop_works_in_a_fresh_user_namespace() -> None:
    def body() -> Any:
        syscalls.call(syscalls.UNSHARE, syscalls.NEWUSER)
        assert capabilities.current()["effective"]
        capabilities.drop_all()
        return capabilities.current()

    after = in_child(body).report
    assert {name: after[name] for name in SETS} == dict.fromkeys(SETS, 0)
