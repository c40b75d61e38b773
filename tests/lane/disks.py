"""The disks of the lane's guest: a root with Python and what the tests need, this checkout, and room to write.

It is a test machine, not the product's guest image: it runs our supervisor.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fumehood.errors import SetupFailed
from fumehood.runtime.microvm import ext4, rootfs
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from lane.init import TESTER, UID

CHECKOUT = Path(__file__).parents[2]
ROOT = "root.ext4"
_NAME, _NEED_BYTES = "v2-lane", 2 << 30
_SCRATCH_BYTES = 1 << 30
_PARTS = ("src", "tests", "pyproject.toml")
_TEST_PACKAGES = ("hypothesis", "pytest", "pytest-asyncio")
_PROGRAMS = ("setsid",)  # beyond those of a guest image
_DIRECTORIES = ("checkout", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var")
_INIT = f"""#!/bin/bash
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev
for disk in /sys/block/vd?; do
    if [ "$(< "$disk/serial")" = checkout ]; then mount -t ext4 -o ro "/dev/${{disk##*/}}" /checkout; fi
done
exec /{rootfs.VENV}/bin/python -I -B /checkout/tests/lane/init.py
"""
_ETC = {
    "passwd": f"root:x:0:0:root:/root:/bin/bash\n{TESTER}:x:{UID}:{UID}::/home/{TESTER}:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\ntty:x:5:\n{TESTER}:x:{UID}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "machine-id": "0123456789abcdef0123456789abcdef\n",
}


def root(assets: Assets) -> Manifest:
    """Made anew only when the environment's packages or this file have changed: the checkout is on a disk of its own."""
    inputs = _inputs()
    try:
        found = assets.load("images", _NAME)
        if found.facts.get("inputs") == inputs:
            return found
    except SetupFailed:
        pass  # not made yet
    return assets.publish("images", _NAME, lambda directory: _make_root(directory, inputs), _NEED_BYTES)


def _inputs() -> str:
    digest = hashlib.sha256(sys.version.encode())
    for path in (Path(__file__), Path(rootfs.__file__), CHECKOUT / "requirements.lock", _libseccomp()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _make_root(directory: Path, inputs: str) -> Facts:
    with tempfile.TemporaryDirectory(prefix=".root-", dir=directory) as scratch:
        tree = Path(scratch)
        rootfs.from_host(*_packages())(tree, lambda text, done, total: None)
        for path in (*filter(None, map(shutil.which, _PROGRAMS)), _libseccomp()):
            _copy(Path(path), tree)
        for name in _DIRECTORIES:
            (tree / name).mkdir(exist_ok=True)
        for name, text in _ETC.items():
            (tree / "etc" / name).write_text(text)
        (tree / "usr/sbin/init").parent.mkdir(exist_ok=True)
        (tree / "usr/sbin/init").write_text(_INIT)
        (tree / "usr/sbin/init").chmod(0o755)
        ext4.make(tree, directory / ROOT)
    return {"inputs": inputs}


def _packages() -> tuple[str, ...]:
    wanted = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    return (*(requirement.split(">")[0] for requirement in wanted), *_TEST_PACKAGES)


def _libseccomp() -> Path:
    """Where the loader has it: opened by name, so in no program's list of libraries."""
    ctypes.CDLL("libseccomp.so.2")
    maps = Path("/proc/self/maps").read_text().split()
    found = Path(next(word for word in maps if "/libseccomp.so.2" in word))
    return found.with_name("libseccomp.so.2")


def _copy(path: Path, tree: Path) -> None:
    target = tree / str(path.parent.resolve() / path.name).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)
    target.chmod(0o755)


def checkout(image: Path, order: Mapping[str, Any]) -> None:
    """`order` is what init.py reads."""
    with tempfile.TemporaryDirectory(prefix="lane-") as scratch:
        tree = Path(scratch, "checkout")
        tree.mkdir()
        for part in _PARTS:
            source = CHECKOUT / part
            if source.is_dir():
                shutil.copytree(source, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, tree / part)
        (tree / "order.json").write_text(json.dumps(order))
        rootfs.compile_code(Path(scratch), "checkout/src")
        for path in tree.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        ext4.make(tree, image)


def scratch(image: Path) -> None:
    """A disk, since a tmpfs has neither direct I/O nor a device to throttle."""
    with image.open("wb") as file:
        file.truncate(_SCRATCH_BYTES)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", str(image)]
    subprocess.run(command, check=True, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
