"""How a guest kernel is started: which of its files, and with which words."""

from __future__ import annotations

from pathlib import Path

from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Manifest
from fumehood.runtime.microvm.kernel import BZIMAGE, VMLINUX


def kernel_file(kernel: Manifest, tier: str) -> Path:
    """Raises SetupFailed when this kernel has not the one that the tier's monitor starts."""
    return kernel.path(VMLINUX if tier == "firecracker" else BZIMAGE)


def boot_args(kernel: Manifest, *more: str) -> str:
    words = [str(kernel.facts["boot_args"]), *more]
    if khz := kvm.tsc_khz():
        words.append(f"tsc_early_khz={khz}")
        if kernel.name == "pvm":  # its delay loop can't be calibrated either
            words.append(f"lpj={khz * 10}")
    return " ".join(words)
