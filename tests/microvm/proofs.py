"""A host with a monitor, guest kernels and an image, as far as a stored proof looks at them: no guest runs from these."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fumehood.config import Config
from fumehood.runtime.microvm.assets import Assets, Facts
from fumehood.runtime.microvm.kernel import inputs
from fumehood.runtime.microvm.proof import Proof, facts, save


def host(directory: Path, **settings: Any) -> Config:
    for name in ("firecracker", "jailer", "qemu-system-x86_64"):
        (directory / name).write_text("#!/bin/sh\nexit 1\n")
        (directory / name).chmod(0o755)
    programs = {"firecracker": str(directory / "firecracker"), "qemu": str(directory / "qemu-system-x86_64")}
    for name in ("state", "run"):
        (directory / name).mkdir(mode=0o700)
    config = Config(directory / "state", directory / "run", **{**programs, **settings})
    for name in ("small", "pvm"):
        publish(config, "kernels", name, b"as first made")
    publish(config, "images", "python", b"as first made")
    return config


def publish(config: Config, kind: str, name: str, data: bytes) -> None:
    Assets(config.state_dir).publish(kind, name, _making(data, {"inputs": inputs(name)} if kind == "kernels" else {}))


def _making(data: bytes, facts: Facts) -> Callable[[Path], Facts]:
    def make(directory: Path) -> Facts:
        (directory / "file").write_bytes(data)
        return facts

    return make


def proved(config: Config, tier: str = "firecracker", kernel: str = "pvm", **given: Any) -> Proof:
    """Stored as if a guest had come up."""
    assets = Assets(config.state_dir)
    now = facts(config, tier, assets.load("kernels", kernel), assets.load("images", "python"))
    at = time.time()
    stored = {"kernel": kernel, "accel": "kvm", "image": "python", "version": "1.12.1", "facts": now, "seconds": 9.5, "at": at}
    return save(config, Proof(tier, **{**stored, **given}))
