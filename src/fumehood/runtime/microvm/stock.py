"""The distribution's own kernel for virtual machines: its binary, and an initramfs that loads the drivers we need."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fumehood.errors import SetupFailed
from fumehood.runtime.microvm import debian, initramfs

PACKAGE = "linux-image-cloud-amd64"
# In this order: virtio needs virtio_ring, and the last needs all before it.
MODULES = (
    *("virtio_ring", "virtio", "virtio_mmio", "virtio_blk", "virtio_console"),
    *("vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"),
)
_INIT = Path(__file__).with_name("guest") / "stock-init"
_LZ4_MAGIC = bytes.fromhex("02214c18")
_HEADER_MAGIC, _PAYLOAD = (0x202, b"HdrS"), 0x248


def make(directory: Path, step: Callable[[str, int, int], None]) -> Mapping[str, Any]:
    """bzImage, vmlinux and initrd into `directory`; the facts. Raises SetupFailed."""
    with tempfile.TemporaryDirectory(prefix=".stock-", dir=directory) as scratch:
        root = Path(scratch)
        package = debian.first_dependency(PACKAGE)
        debs = debian.unpack([package, "busybox-static"], root, step, closure=False)
        release = package.removeprefix("linux-image-")
        shutil.copyfile(root / f"boot/vmlinuz-{release}", directory / "bzImage")
        step("unpacking the kernel", 0, 1)
        (directory / "vmlinux").write_bytes(extract(directory / "bzImage"))
        (directory / "initrd").write_bytes(_initrd(root, release))
    return {"version": release, "source": ", ".join(debs)}


def _initrd(root: Path, release: str) -> bytes:
    found = {p.stem: p for p in (root / "lib/modules" / release).rglob("*.ko")}
    if missing := [name for name in MODULES if name not in found]:
        raise SetupFailed(f"the kernel {release} lacks modules", cause=", ".join(missing))
    files = {f"modules/{name}.ko": (0o644, found[name].read_bytes()) for name in MODULES}
    files["modules/order"] = (0o644, "".join(f"{name}.ko\n" for name in MODULES).encode())
    files["bin/busybox"] = (0o755, (root / "bin/busybox").read_bytes())
    files["init"] = (0o755, _INIT.read_bytes())
    return initramfs.archive(files, ("bin", "dev", "modules", "root"))


def extract(bzimage: Path) -> bytes:
    """The ELF file in a bzImage that was compressed with LZ4. Layout: Documentation/x86/boot.rst, payload_offset.

    Raises SetupFailed for another compression, and where there is no lz4.
    """
    image = bzimage.read_bytes()
    offset, magic = _HEADER_MAGIC
    if image[offset : offset + 4] != magic:
        raise SetupFailed(f"{bzimage.name} is not a kernel", cause="it has no boot header")
    start, length = struct.unpack_from("<II", image, _PAYLOAD)
    start += (image[0x1F1] + 1) * 512
    payload = image[start : start + length]
    if not payload.startswith(_LZ4_MAGIC):
        raise SetupFailed(f"{bzimage.name} can't be unpacked", cause="it is not compressed with LZ4")
    if shutil.which("lz4") is None:
        raise SetupFailed("the kernel can't be unpacked", cause="no lz4 here", remediation="apt-get install lz4")
    done = subprocess.run(["lz4", "-dc"], input=payload[:-4], capture_output=True)
    if done.returncode or not done.stdout.startswith(b"\x7fELF"):
        raise SetupFailed(f"{bzimage.name} can't be unpacked", cause=done.stderr.decode(errors="replace")[-300:])
    return done.stdout
