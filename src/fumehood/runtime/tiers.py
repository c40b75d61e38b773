"""The tiers of this build, how each is made, on first use, and which of them `auto` is on this host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from fumehood.config import Config
from fumehood.errors import ProtectionUnavailable
from fumehood.runtime.base import Runtime

if TYPE_CHECKING:
    from fumehood.runtime.microvm.proof import Proof

MICROVM = ("firecracker", "qemu")
_PROOFS = "microvm/selftest.json"  # runtime/microvm/proof.py; where there is none, nothing of microVMs is loaded
_NEVER_TRIED = "it was never tried on this host"
_QEMU_JAIL = "a root directory and a uid of its own, no capability, QEMU's seccomp filter"


def _native(config: Config) -> Runtime:
    from fumehood.runtime.native.driver import NativeRuntime

    return NativeRuntime(config)


def _fake(config: Config) -> Runtime:
    from fumehood.runtime.fake import FakeRuntime

    return FakeRuntime(config)


def _firecracker(config: Config) -> Runtime:
    from fumehood.runtime.microvm.driver import MicrovmRuntime, speed
    from fumehood.runtime.microvm.firecracker import Firecracker
    from fumehood.runtime.microvm.proof import program, proven_kernel

    proof = _proven(config, "firecracker")
    vmm = Firecracker(program(config, "firecracker"))
    return MicrovmRuntime(config, vmm, lambda: proven_kernel(config, proof), vmm.jailed, speed(proof))


def _qemu(config: Config) -> Runtime:
    from fumehood.runtime.microvm.driver import MicrovmRuntime, speed
    from fumehood.runtime.microvm.proof import program, proven_kernel
    from fumehood.runtime.microvm.qemu import Qemu

    proof = _proven(config, "qemu")
    vmm = Qemu(program(config, "qemu"), proof.accel)
    return MicrovmRuntime(config, vmm, lambda: proven_kernel(config, proof), _QEMU_JAIL, speed(proof))


TIERS: Mapping[str, Callable[[Config], Runtime]] = {
    "firecracker": _firecracker,
    "native": _native,
    "qemu": _qemu,
    "fake": _fake,
}


class Choice(NamedTuple):
    """`weaker`: what to warn of, when `auto` is less than it was."""

    tier: str
    why: str
    weaker: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """A tier on this host, for people. `reason` and `fix` are empty where it can be used."""

    tier: str
    usable: bool
    detail: str = ""
    reason: str = ""
    fix: str = ""
    at: float | None = None  # when it was tried, Unix seconds
    lost: bool = False


def choose(config: Config) -> Choice:
    """What `auto` is: the setting `tier`, else firecracker where it is proven, else native. Never qemu: docs/decisions/0008."""
    if config.tier != "auto":
        return Choice(config.tier, "the setting tier names it")
    standing = microvm(config, "firecracker")
    if standing.usable:
        return Choice("firecracker", f"it is proven: {standing.detail}")
    weaker = f"auto is native now, not firecracker: {standing.reason}; {standing.fix}" if standing.lost else ""
    return Choice("native", f"firecracker is not proven: {standing.reason}", weaker)


def microvm(config: Config, tier: str) -> Standing:
    """By what the last self-test stored. Costs a stat where there was none."""
    fix = f"run: fumehood image prepare {tier}"
    if not (config.state_dir / _PROOFS).exists():
        return Standing(tier, usable=False, reason=_NEVER_TRIED, fix=fix)
    from fumehood.runtime.microvm.proof import Proof

    proof = Proof.load(config, tier)
    detail = _in_words(proof) if proof.proven else ""
    return Standing(tier, proof.proven, detail, proof.reason, "" if proof.proven else fix, proof.at or None, proof.lost)


def _in_words(proof: Proof) -> str:
    day = time.strftime("%Y-%m-%d", time.localtime(proof.at))
    return f"{proof}; tried on {day}, {proof.seconds:.1f} s"


def _proven(config: Config, tier: str) -> Proof:
    from fumehood.runtime.microvm.proof import Proof

    proof = Proof.load(config, tier)
    if not proof.proven:
        raise ProtectionUnavailable(
            f"the tier {tier} is not proven on this host",
            cause=proof.reason,
            remediation=f"run: fumehood image prepare {tier}",
        )
    return proof
