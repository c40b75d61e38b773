"""Kernels, images and Firecracker (ahead.py); and what a host must have for these tests."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import ahead
import hostile
import pytest
import vms

from fumehood import Sandbox
from fumehood.client.engine import Engine
from fumehood.errors import ProtectionUnavailable
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.firecracker import Firecracker
from fumehood.runtime.microvm.image import ROOTFS
from fumehood.runtime.microvm.machine import MachineSpec
from fumehood.runtime.microvm.proof import Proof


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("microvm") and (packages := ahead.lacking()):
            item.add_marker(pytest.mark.skip(reason=f"needs {packages}"))
        names = (item.nodeid, *getattr(item, "fixturenames", ()))
        if not os.path.exists(kvm.DEVICE) and any("firecracker" in name for name in names):
            item.add_marker(pytest.mark.may_skip("this host has no KVM, which no package brings"))


@pytest.fixture(scope="session")
def cached() -> Assets:
    return Assets(ahead.STATE)


@pytest.fixture(scope="session")
def kernel(cached: Assets) -> Callable[[str], Manifest]:
    return functools.partial(ahead.kernel, cached)


@pytest.fixture(scope="session")
def image(cached: Assets) -> Callable[[str], Manifest]:
    return functools.partial(ahead.image, cached)


@pytest.fixture(scope="session")
def firecracker() -> Path:
    """Its jailer lies beside it."""
    try:
        kvm.check()
    except ProtectionUnavailable as e:
        pytest.skip(str(e))
    return ahead.firecracker()


@pytest.fixture(scope="session")
def machines_dir(cached: Assets) -> Iterator[Path]:
    """On the file system of the assets."""
    with tempfile.TemporaryDirectory(prefix="machines-", dir=ahead.STATE) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def booted(
    firecracker: Path, kernel: Callable[[str], Manifest], image: Callable[[str], Manifest], machines_dir: Path
) -> tuple[MachineSpec, Path]:
    """A machine of Firecracker's, and a snapshot of it: a cold boot takes a minute."""
    spec = vms.spec_of(kernel("pvm"), image("python").path(ROOTFS))
    return spec, vms.golden(Firecracker(firecracker), spec, machines_dir, vms.UID)


@pytest.fixture(scope="module", params=hostile.TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    with hostile.engine(request, request.param):
        yield request.param


@pytest.fixture(scope="module")
def guest_kernel(tier: str) -> str:
    """The profile that it was proven with."""
    return Proof.load(Engine.of_this_process().supervisor.config, tier).kernel


@pytest.fixture(scope="module")
def box(tier: str) -> Iterator[Sandbox]:
    """One for many attacks that leave no trace."""
    with Sandbox(tier=tier, url="", limits=hostile.LIMITS) as sandbox:
        yield sandbox
