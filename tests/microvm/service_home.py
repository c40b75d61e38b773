"""Directories for a service of a test's own on a microVM tier. Golden snapshots are kept in them between runs, nothing else."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fumehood.runtime.microvm.assets import Assets
from fumehood.runtime.microvm.proof import Proof
from fumehood.runtime.microvm.selftest import prove
from service.opened import config


def made(cached: Assets, tier: str, kernels: Sequence[str] | None = None, **settings: Any) -> Path:
    """A directory of its own for each tier: whoever serves a state directory has it to itself. The tier is proven there."""
    assets = cached.directory("images", "python").parents[1]
    home = assets.parent / f"service-{tier}"
    (state := home / "state/microvm").mkdir(mode=0o700, parents=True, exist_ok=True)
    for kind in ("kernels", "images"):
        if not (link := state / kind).is_symlink():
            link.symlink_to(assets / kind)
    for store in (home / "state").glob("store.db*"):
        store.unlink()
    for snapshot in state.glob("snapshots/live-*"):
        shutil.rmtree(snapshot)
    chosen = config(home, tier, **settings)
    if not (proof := Proof.load(chosen, tier)).proven:
        proof = asyncio.run(prove(chosen, tier, kernels=kernels))
    assert proof.proven, proof.reason
    return home
