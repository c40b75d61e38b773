"""H13: each protection is reported as it is on this host, with what to do where it is missing."""

from __future__ import annotations

import errno
import subprocess
import sys
from typing import Any

import pytest

from fumehood.errors import ProtectionUnavailable
from fumehood.model import Enforcement
from fumehood.runtime.native import confinement, landlock, libseccomp, peek, seccomp_install

NAMES = ["seccomp", "syscall-count", "landlock", "capabilities", "no-new-privs"]


@pytest.fixture(autouse=True)
def asked_afresh() -> Any:
    confinement.protections.cache_clear()
    yield
    confinement.protections.cache_clear()


def states() -> dict[str, Enforcement]:
    return {p.name: p.state for p in confinement.protections()}


def test_all_five_are_reported_and_whatever_is_not_enforced_says_how_to_mend_it() -> None:
    found = confinement.protections()
    assert [p.name for p in found] == NAMES
    assert all(p.fix for p in found if p.state is not Enforcement.ENFORCED)


def test_without_libseccomp_seccomp_is_off_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise ProtectionUnavailable("libseccomp is missing", cause="no file", remediation=libseccomp.FIX)

    monkeypatch.setattr(libseccomp, "newest", absent)
    (seccomp,) = [p for p in confinement.protections() if p.name == "seccomp"]
    assert seccomp.state is Enforcement.OFF and "apt-get install" in seccomp.fix


@pytest.mark.parametrize(("abi", "state"), [(0, "off"), (1, "degraded"), (5, "degraded"), (6, "enforced"), (9, "enforced")])
def test_landlock_is_only_called_enforced_if_it_scopes_signals(monkeypatch: pytest.MonkeyPatch, abi: int, state: str) -> None:
    monkeypatch.setattr(landlock, "abi", lambda: abi)
    assert states()["landlock"] == state


def test_where_a_process_cannot_be_reached_into_counting_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, number: int) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(peek, "copy_descriptor", refused)
    assert states()["syscall-count"] is Enforcement.OFF


def test_what_runs_inside_a_template_imports_nothing_but_the_standard_library() -> None:
    """The template's root may have no libseccomp and no third-party package."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from fumehood.runtime.native import capabilities, landlock, seccomp_install\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "assert new <= {'fumehood'}, new\n"
        "ours = {m for m in sys.modules if m.startswith('fumehood.')}\n"
        "allowed = {'capabilities', 'landlock', 'seccomp_install', 'syscalls', 'native', 'runtime'}\n"
        "assert {m.split('.')[-1] for m in ours} <= allowed, ours\n"
    )
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {SOURCE!r})\n{code}"], check=True)


SOURCE = str(seccomp_install.__file__).removesuffix("/fumehood/runtime/native/seccomp_install.py")
