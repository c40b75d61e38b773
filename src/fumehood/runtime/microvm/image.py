"""Guest images: a root file system with Python and the agent, as a read-only ext4 image with a manifest."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import fumehood.agent
from fumehood.agent import wire
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
_DIRECTORIES = ("dev", "etc", "home/user", "opt/fumehood", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin")
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

    facts: python (its version, or empty), generation, agent (digest).

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
    """What makes a root file system a guest: the agent, init, accounts, mount points, byte code.

    Raises SetupFailed when a link in it leads what is written out of it.
    """
    for directory in _DIRECTORIES:
        _place(root, f"{directory}/any")
    python = _python(root)
    _add_agent(_place(root, "opt/fumehood/fumehood"))
    _write(_place(root, "sbin/init"), _INIT.read_text().replace("@PYTHON@", f"/{python}"), 0o755)
    for name, text in _ETC.items():
        _write(_place(root, f"etc/{name}"), text, 0o644)
    for name in _RENEWED:
        _link(_place(root, f"etc/{name}"), f"/run/{name}")
    _link(_place(root, "var/tmp"), "/tmp")
    version = _version(root, python)
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        step("compiling byte code", 0, 1)
        rootfs.compile_code(root, "opt/fumehood")
    return {"python": version, "generation": wire.GENERATION, "agent": agent_digest()}


def _place(root: Path, name: str) -> Path:
    """Where `name` is written; its directory is made."""
    directory = root
    for part in Path(name).parent.parts:
        directory /= part
        if not directory.resolve().is_relative_to(root.resolve()):
            raise SetupFailed(
                "the root file system can't be used",
                cause=f"its {directory.relative_to(root)} is a link that leads out of it",
                remediation="make that link a relative one",
            )
        directory.mkdir(exist_ok=True)
    return directory / Path(name).name


@cache
def agent_digest() -> str:
    """Of the agent's code: an image with another one has to be made again."""
    digest = hashlib.sha256(_INIT.read_bytes())
    for path in sorted(p for p in _AGENT.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(path.relative_to(_AGENT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


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
    if package.is_symlink() or package.exists():
        raise SetupFailed("the root file system can't be used", cause="it has a /opt/fumehood/fumehood of its own")
    package.mkdir()
    shutil.copytree(_AGENT, package / "agent", ignore=shutil.ignore_patterns("__pycache__"))
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
