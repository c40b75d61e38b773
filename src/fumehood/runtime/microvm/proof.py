"""What the self-test found, in state_dir/microvm/selftest.json: a tier counts as proven while all that it was proven with is
the same. Anything else, a file that can't be read above all, is "not proven".
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

from fumehood.config import Config
from fumehood.errors import InvalidInput, SetupFailed
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.image import agent_digest

FORMAT = 1
FILE = "microvm/selftest.json"
PROGRAMS = {"firecracker": "firecracker", "qemu": "qemu-system-x86_64"}  # tier: its monitor; each is a setting, too
FACTS = {
    "host_kernel": "this host's kernel",
    "monitor": "the monitor's program",
    "kvm": "access to /dev/kvm",
    "kernel": "the guest kernel",
    "image": "the guest image",
    "agent": "fumehood's agent",
}
_QEMU_SAYS = "QEMU emulator version "
_MOST_BYTES = 1 << 20
_FAULTS = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)  # of a file that is damaged


@dataclass(frozen=True, slots=True)
class Proof:
    """`reason`: why the tier is not proven; empty: it is. `kernel` and `image` are names of assets."""

    tier: str
    reason: str = ""
    kernel: str = ""
    accel: str = ""
    image: str = ""
    version: str = ""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0
    at: float = 0.0  # when it was tried, Unix seconds; 0 = never
    proven_at: float = 0.0  # the last time that it was proven; 0 = never

    @property
    def proven(self) -> bool:
        return not self.reason

    @property
    def lost(self) -> bool:
        """It was proven once and is not any more: who relied on it must be told."""
        return not self.proven and self.proven_at > 0

    @property
    def emulated(self) -> bool:
        """Whether guests' kernels run in software: `pvm` is for such a KVM."""
        return self.kernel == "pvm" or self.accel == "tcg"

    def __str__(self) -> str:
        weaker = " (its own mitigations are off: KVM is emulated here)" if self.kernel == "pvm" else ""
        return f"{self.tier} {self.version.removeprefix(_QEMU_SAYS)}, kernel {self.kernel}{weaker}, {self.accel}"

    @classmethod
    def load(cls, config: Config, tier: str) -> Self:
        """As it holds now; never raises."""
        path = config.state_dir / FILE
        try:
            stored = _read(path).get(tier)
        except FileNotFoundError:
            stored = None
        except _FAULTS as e:
            # What it said nobody knows: perhaps that the tier was proven.
            return cls(tier, reason=f"{path} can't be read: {e!r:.200}", proven_at=_changed_at(path))
        if stored is None:
            return cls(tier, reason="it was never tried on this host")
        found = cls(**stored)
        return replace(found, reason=_changed(config, found)) if found.proven else found


def program(config: Config, tier: str) -> Path | None:
    """The monitor: the one that the setting names, else the one on PATH."""
    found = shutil.which(getattr(config, tier) or PROGRAMS[tier])
    return Path(found).absolute() if found else None


def facts(config: Config, tier: str, kernel: Manifest, image: Manifest) -> dict[str, str]:
    """What a proof depends on. A monitor is known by its file: who asks for its version runs it, which takes time."""
    monitor = program(config, tier)
    files = [monitor, monitor.with_name("jailer")] if monitor else []
    return {
        "host_kernel": platform.release(),
        "monitor": "; ".join(_stamp(path) for path in files),
        "kvm": " ".join(("yes", *kvm.modules())) if os.access(kvm.DEVICE, os.R_OK | os.W_OK) else "no",
        "kernel": kernel.digest,
        "image": image.digest,
        "agent": agent_digest(),
    }


def proven_kernel(config: Config, proof: Proof) -> Manifest:
    """The very one. Raises SetupFailed for another that has its name by now."""
    kernel = Assets(config.state_dir).load("kernels", proof.kernel)
    if kernel.digest != proof.facts["kernel"]:
        raise SetupFailed(
            f"the guest kernel {kernel.name!r} is not the one that was proven",
            cause="it was made anew since",
            remediation=f"run: fumehood image prepare {proof.tier}",
        )
    return kernel


def save(config: Config, proof: Proof) -> Proof:
    """As stored: with the last time that its tier was proven. What was stored of other tiers stays, if it can be read."""
    path = config.state_dir / FILE
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.parent):
        before = Proof.load(config, proof.tier).proven_at
        proof = replace(proof, proven_at=proof.at if proof.proven else before)
        kept: dict[str, Any] = {}
        with contextlib.suppress(*_FAULTS):
            kept = _read(path)
        _write(path, json.dumps({"format": FORMAT, "tiers": {**kept, proof.tier: asdict(proof)}}, indent=1))
    return proof


def _changed(config: Config, proof: Proof) -> str:
    assets = Assets(config.state_dir)
    try:
        kernel, image = assets.load("kernels", proof.kernel), assets.load("images", proof.image)
    except (SetupFailed, InvalidInput) as e:
        return str(e)
    now = facts(config, proof.tier, kernel, image)
    words = [FACTS[name] for name in FACTS if now[name] != proof.facts[name]]
    return f"{', '.join(words)} changed since it was proven" if words else ""


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Of each tier the fields of its Proof, checked. Raises one of _FAULTS."""
    with path.open("rb") as file:
        document = cast("dict[str, Any]", json.loads(file.read(_MOST_BYTES)))
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']!r:.20}, this version reads {FORMAT}")
    return {tier: _checked(tier, entry) for tier, entry in document["tiers"].items()}


def _checked(tier: str, entry: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, object] = asdict(Proof(tier))
    for name, usual in plain.items():
        if not isinstance(entry[name], type(usual)):
            raise TypeError(f"{tier}.{name} is {entry[name]!r:.40}")
    if entry["tier"] != tier or len(entry) != len(plain):
        raise ValueError(f"the entry {tier} is another's")
    if not entry["reason"] and not {*FACTS} <= {n for n, v in entry["facts"].items() if isinstance(v, str)}:
        raise ValueError(f"{tier} is said to be proven, with nothing to tell it by")
    return entry


def _stamp(path: Path) -> str:
    try:
        s = path.stat()
    except OSError:
        return f"no {path.name}"
    return f"{path} {s.st_size} {s.st_ino} {s.st_mtime_ns}"


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 1.0


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    """Two self-tests may end at once, and each writes what the other has found, too."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.new")
    part.unlink(missing_ok=True)  # of one who was killed: we hold the lock
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(fd)
    part.replace(path)
