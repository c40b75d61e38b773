"""Directories in which a tier is proven, for tests of what lies above it. Its golden snapshots are kept between runs. No
other tests use them, for whoever starts in a state directory removes what seems left of the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import ahead

from cli.served import Served
from fumehood.client.engine import Engine
from fumehood.config import Config
from fumehood.runtime.microvm.proof import Proof
from fumehood.runtime.microvm.selftest import prove

_POLICY = Path(__file__).with_name("small.toml")
_COMMAND = [sys.executable, "-c", "from fumehood.cli import main; main()"]


def environment(assets: Path, tier: str = "qemu", **settings: str) -> dict[str, str]:
    """Settings as variables. `assets` is the state directory that has the kernels and images."""
    home = assets / "sdk"
    home.mkdir(exist_ok=True)
    for directory in (home / "state", home / "run", home / "state/microvm"):
        directory.mkdir(mode=0o700, exist_ok=True)
    for kind in ("kernels", "images"):
        if not (link := home / "state/microvm" / kind).is_symlink():
            link.symlink_to(assets / "microvm" / kind)
    # Emulated guests, on a machine that runs other tests too, whose supervisors know of no uids taken here.
    ours = {"FUMEHOOD_AGENT_TIMEOUT_S": "24", "FUMEHOOD_UID_BASE": "300000000", "FUMEHOOD_DEFAULT_POLICY": str(_POLICY)}
    env = {"FUMEHOOD_STATE_DIR": str(home / "state"), "FUMEHOOD_RUN_DIR": str(home / "run"), **ours, **settings}
    config = Config.load(env)
    with ahead.one_maker(f"proof-{tier}"):
        if not (proof := Proof.load(config, tier)).proven:
            proof = asyncio.run(prove(config, tier))
    assert proof.proven, proof.reason
    return env


@contextlib.contextmanager
def engine(assets: Path, tier: str, **settings: str) -> Iterator[Engine]:
    """Meanwhile this process's own sandboxes of that tier are machines of these directories."""
    config = Config.load(environment(assets, tier, **settings))
    Engine.of_this_process(config).close()  # of earlier tests, with other directories
    ours = Engine.of_this_process(config)
    try:
        yield ours
    finally:
        ours.close()


@contextlib.contextmanager
def server(env: dict[str, str], home: Path) -> Iterator[Served]:
    """A `fumehood serve` whose sandboxes are machines. Its records are those of the runs before."""
    settings = {name.removeprefix("FUMEHOOD_").lower(): value for name, value in env.items()}
    served = Served(_COMMAND, home, tier="qemu", pool_policies="", **settings)
    served.state = Path(env["FUMEHOOD_STATE_DIR"])
    try:
        yield served.start()
    finally:
        assert served.stop() == 0, served.said.decode()
