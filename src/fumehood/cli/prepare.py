"""`fumehood image prepare TIER`: everything that a microVM tier needs on this host, and the proof that it works here."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits
from fumehood.cli.progress import Step, progress
from fumehood.cli.reach import JsonOption
from fumehood.errors import InvalidInput, ProtectionUnavailable, SetupFailed

if TYPE_CHECKING:
    from fumehood.config import Config
    from fumehood.runtime.microvm.assets import Assets
    from fumehood.runtime.microvm.proof import Proof

_MONITORS = {"qemu": ("qemu-system-x86",)}  # Debian has no package of Firecracker
_BUILDERS = {
    "images": ("e2fsprogs",),
    "stock": ("lz4",),
    "small": ("gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils"),
}
_BUILDERS["pvm"] = _BUILDERS["small"]
_OTHERWISE = {
    "firecracker": "use the tier native, or set up the slower one that needs no KVM: fumehood image prepare qemu",
    "qemu": "what the guest said last is in the cause; the tier native needs no guest",
}


def prepare(
    tier: Annotated[str, typer.Argument(help="firecracker (needs KVM) or qemu (needs nothing of the host, and is slow).")],
    template: Annotated[str, typer.Option(help="What its sandboxes are made from: python or data-analysis.")] = "python",
    install: Annotated[bool, typer.Option("--install", help="As root on Debian: apt-get what is missing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Set a microVM tier up: image, kernel, self-test, snapshot. Minutes the first time; what is there is not made again."""
    exits.drive(_prepare(tier, template, install, as_json), as_json=as_json)


async def _prepare(tier: str, template: str, install: bool, as_json: bool) -> int:
    from fumehood.config import Config
    from fumehood.runtime.tiers import MICROVM

    if tier not in MICROVM:
        raise InvalidInput(
            f"nothing to prepare for the tier {tier!r}", cause=f"known: {', '.join(MICROVM)}", remediation="name one"
        )
    config, started = dataclasses.replace(Config.load(), url=""), time.monotonic()
    with progress(not as_json) as step, _stoppable(step) as step:
        preparation = Preparation(config, tier, template, install, step)
        proof = await preparation.proved()
        create_ms = await preparation.first_sandboxes()
    row: dict[str, Any] = {
        **{name: getattr(proof, name) for name in ("tier", "version", "kernel", "accel")},
        "is": str(proof),
        "template": template,
        "create_ms": round(create_ms),
        "seconds": round(time.monotonic() - started, 1),
        "policy": preparation.policy,
        "next": f"fumehood run --tier {tier} --policy {preparation.policy} -c 'print(6 * 7)'",
    }
    exits.print_json(row) if as_json else print(_in_words(row))
    return 0


@contextlib.contextmanager
def _stoppable(step: Step) -> Generator[Step]:
    """Work in a thread hears of SIGTERM at its next step: unlike Ctrl-C that arrives at no compiler, whose end would be its."""
    stopped = threading.Event()

    def checked(text: str, done: int, total: int) -> None:
        if stopped.is_set():
            raise InterruptedError("stopped")
        step(text, done, total)

    try:
        yield checked
    except asyncio.CancelledError:
        stopped.set()
        print("stopping: what is half made is removed, which can take a minute; what is whole is kept", file=sys.stderr)
        raise


def _in_words(row: dict[str, Any]) -> str:
    auto = "; auto takes it from now on (a running server: from its next start)" if row["tier"] == "firecracker" else ""
    made = f"ready in {row['seconds']:.0f} s: {row['is']}, a sandbox in {row['create_ms']} ms{auto}"
    return f"{made}; made from the template {row['template']}, others are prepared by --template; try: {row['next']}"


@dataclasses.dataclass(frozen=True)
class Preparation:
    config: Config
    tier: str
    template: str
    install: bool
    step: Step

    @property
    def policy(self) -> str:
        """Whose sandboxes are likely to come: the template's own preset, which gives it more memory, or the default one."""
        from fumehood.policy.load import preset_names

        return self.template if self.template in preset_names() else self.config.default_policy

    async def proved(self) -> Proof:
        """Raises ProtectionUnavailable when no guest runs here, and what building raises."""
        from fumehood.runtime.microvm.assets import Assets
        from fumehood.runtime.microvm.proof import Proof
        from fumehood.runtime.microvm.selftest import prove

        assets = Assets(self.config.state_dir)
        await self._monitor()
        # Threads: Ctrl-C still arrives, also at compilers and archivers, and their end is its end.
        await asyncio.to_thread(self._image, assets)
        proof = Proof.load(self.config, self.tier)
        if proof.proven and _is_current(assets, proof.kernel):
            return proof
        failures: list[str] = []
        for profile in await asyncio.to_thread(_profiles, assets, self.tier):
            if failures:
                self.step(f"that did not come up ({failures[-1].splitlines()[0][:200]}); now the kernel {profile}", 0, 1)
            await asyncio.to_thread(self._kernel, assets, profile)
            proof = await prove(self.config, self.tier, self.step, image=self.template, kernels=[profile])
            if proof.proven:
                return proof
            failures.append(proof.reason)
        raise ProtectionUnavailable(
            f"no guest of the tier {self.tier} works on this host", cause="\n".join(failures), remediation=_OTHERWISE[self.tier]
        )

    async def first_sandboxes(self) -> float:
        """How long the creation of a second one takes, in ms: the first makes the snapshot. Raises what creations raise."""
        from fumehood.client.sandbox import AsyncSandbox

        self.step("making the golden snapshot", 0, 1)
        create_ms = 0.0
        for _ in range(2):
            async with AsyncSandbox(policy=self.policy, template=self.template, tier=self.tier, config=self.config) as box:
                result = await box.run("6 * 7")
                create_ms = result.timings.create_ms
            if result.text != "42":
                raise SetupFailed(
                    "the first sandbox gave no right answer", cause=f"{result.status}: {result.cause or result.text}"
                )
        return create_ms

    async def _monitor(self) -> None:
        from fumehood.runtime.microvm import kvm
        from fumehood.runtime.microvm.proof import program
        from fumehood.runtime.microvm.selftest import monitor

        if program(self.config, self.tier) is None and not getattr(self.config, self.tier) and self.tier in _MONITORS:
            await asyncio.to_thread(self._get, _MONITORS[self.tier])
        await monitor(self.config, self.tier).version()
        if self.tier == "firecracker":
            kvm.check()
            if (found := program(self.config, self.tier)) and os.geteuid() == 0:
                _check_jailed(found)

    def _image(self, assets: Assets) -> None:
        from fumehood.runtime.microvm.image import agent_digest, build_image

        if not _has(assets, "images", self.template, "agent", agent_digest()):
            self._get(_BUILDERS["images"])
            build_image(assets, self.template, None, self.step)

    def _kernel(self, assets: Assets, profile: str) -> None:
        from fumehood.runtime.microvm.kernel import build_kernel

        if not _is_current(assets, profile):
            self._get(_BUILDERS[profile])
            build_kernel(assets, profile, self.step)

    def _get(self, packages: Sequence[str]) -> None:
        """Only if asked to; without, what fails for want of a package says which. Those that are there stay as they are."""
        if not self.install:
            return
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise InvalidInput(
                "--install can't install here",
                cause="it takes root and apt-get",
                remediation="leave it out: it says what is missing",
            )
        self.step(f"apt-get install {' '.join(packages)}", 0, 1)
        command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", "--no-upgrade", *packages]
        done = subprocess.run(
            ["env", "DEBIAN_FRONTEND=noninteractive", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            raise SetupFailed("apt-get failed", cause=done.stderr.strip()[-500:], remediation="apt-get update, then again")


def _check_jailed(firecracker: Path) -> None:
    """Raises ProtectionUnavailable for what would be found out after minutes of compiling."""
    jailer = firecracker.with_name("jailer")
    if not jailer.exists():
        raise ProtectionUnavailable(
            "Firecracker has no jailer",
            cause=f"{jailer} is not there, and as root each machine runs under it",
            remediation="put the jailer of the same release beside firecracker",
        )
    for path in (firecracker, jailer):
        if not path.stat().st_mode & stat.S_IXOTH:
            raise ProtectionUnavailable(
                f"{path} can't be run by a machine's own uid",
                cause=f"its mode is {stat.S_IMODE(path.stat().st_mode):o}",
                remediation=f"chmod 755 {path}",
            )


def _profiles(assets: Assets, tier: str) -> Sequence[str]:
    """The guest kernels to try. For QEMU the one that is there: any works, and stock takes seconds to make. For Firecracker the
    likelier one first, each is minutes of compiling.
    """
    from fumehood.runtime.microvm import kvm

    if tier == "firecracker":
        return ("pvm", "small") if kvm.is_emulated() else ("small", "pvm")
    return ("small",) if _is_current(assets, "small") else ("stock",)


def _is_current(assets: Assets, profile: str) -> bool:
    from fumehood.runtime.microvm.kernel import inputs

    return _has(assets, "kernels", profile, "inputs", inputs(profile))


def _has(assets: Assets, kind: str, name: str, fact: str, value: str) -> bool:
    try:
        return assets.load(kind, name).facts.get(fact) == value
    except SetupFailed:
        return False
