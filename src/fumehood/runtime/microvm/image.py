"""Guest images: a root file system with Python and the agent, as a read-only ext4 image with a manifest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import fumehood.agent
from fumehood.agent import serve, wire
from fumehood.errors import SetupFailed
from fumehood.runtime.microvm import ext4, rootfs
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from fumehood.runtime.microvm.rootfs import Fill, Step

ROOTFS = "rootfs.ext4"
# The names of the policies' templates, and `minimal`: nothing of this host's, Debian's Python without libraries.
IMAGES: Mapping[str, Fill] = {
    "python": rootfs.from_host("ipython"),
    "data-analysis": rootfs.from_host("ipython", "numpy", "pandas", "matplotlib"),
    "minimal": rootfs.from_packages(),
}
_NEED_BYTES = 2 << 30  # the tree, its image and a margin
_AGENT = Path(fumehood.agent.__file__).parent
_INIT = Path(__file__).with_name("guest") / "init"
_PYTHONS = (f"{rootfs.VENV}/bin/python3", "usr/local/bin/python3", "usr/bin/python3", "usr/bin/python3.11", "bin/python3")
_DIRECTORIES = (
    "dev",
    "etc",
    "home/user",
    "opt/fumehood/fumehood",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr/bin",
    "var",
)
_ETC = {
    "passwd": "root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:1000:1000::/home/user:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": "root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "resolv.conf": "",  # there is no network device: a look-up fails at once
}
# Each machine has its own, renewed by `bind`; the root is read-only, so they lie in the guest's /run.
_RENEWED = ("hostname", "machine-id")


def build_image(assets: Assets, name: str, fill: Fill | None = None, step: Step = lambda text, done, total: None) -> Manifest:
    """Makes and publishes the image `name`; `fill` None = the one of IMAGES. The same inputs make the same bytes.

    Raises SetupFailed for what is missing on this host and CapacityExceeded when the disk is too full.
    """
    fill = fill or IMAGES.get(name)
    if fill is None:
        raise SetupFailed(
            f"no recipe for an image {name!r}", cause=f"known: {', '.join(IMAGES)}", remediation="name one, or give --root DIR"
        )

    def make(directory: Path) -> Facts:
        with tempfile.TemporaryDirectory(prefix=".root-", dir=directory) as scratch:
            root = Path(scratch)
            fill(root, step)
            facts = finish(root, step)
            step("making the file system", 0, 1)
            ext4.make(root, directory / ROOTFS)
        return facts

    return assets.publish("images", name, make, _NEED_BYTES)


def finish(root: Path, step: Step) -> Facts:
    """What makes a root file system a guest: the agent, init, accounts, mount points, byte code."""
    for directory in _DIRECTORIES:
        (root / directory).mkdir(parents=True, exist_ok=True)
    python = _python(root)
    _add_agent(root / "opt/fumehood/fumehood")
    _write(root / "sbin/init", _INIT.read_text().replace("@PYTHON@", f"/{python}"), 0o755)
    for name, text in _ETC.items():
        _write(root / "etc" / name, text, 0o644)
    for name in _RENEWED:
        _link(root / "etc" / name, f"/run/{name}")
    _link(root / "var/tmp", "/tmp")
    (root / "home/user").chmod(0o755)
    version = _version(root, python)
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        step("compiling byte code", 0, 1)
        _compile(root)
    return {"python": version, "agent": serve.VERSION, "generation": wire.GENERATION}


def _python(root: Path) -> str:
    for path in _PYTHONS:
        if (root / path).is_symlink() or (root / path).exists():
            return path
    raise SetupFailed(
        "the image has no Python 3", cause=f"looked for {', '.join(_PYTHONS)}", remediation="add one: the agent runs on it"
    )


def _version(root: Path, python: str) -> str:
    """3.11, told from where its links end: no program of the image is run here. Empty if the name does not say."""
    for _ in range(8):
        if not (root / python).is_symlink():
            break
        python = os.path.normpath(os.path.join("/", os.path.dirname(python), os.readlink(root / python))).lstrip("/")
    found = re.search(r"python(\d+\.\d+)$", python)
    return found[1] if found else ""


def _add_agent(package: Path) -> None:
    shutil.copytree(_AGENT, package / "agent", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    _write(package / "__init__.py", "", 0o644)  # the package's own is the client
    for path in (package / "agent", *(package / "agent").rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)  # a root of somebody else's may have a link there
    path.write_text(text)
    path.chmod(mode)


def _link(path: Path, target: str) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _compile(root: Path) -> None:
    """A process of its own with a fixed hash seed: the order of a set's constants is written into byte code.

    unchecked-hash, since all times in the image are the same and nothing in it ever changes.
    """
    code = [sys.executable, "-s", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
    places = [p for p in (root / "usr/lib", root / "usr/local/lib", root / "opt") if p.is_dir()]
    # Some files of the standard library and of packages are not meant to compile; the rest is compiled all the same.
    subprocess.run(
        [*code, *map(str, places)], env={"PYTHONHASHSEED": "0"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
