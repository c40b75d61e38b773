"""What a guest's root is filled with: this host's own Python environment, Debian packages, or an unpacked directory.

Only copies and unpacks: no program of a foreign root is run on the host.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

from fumehood.errors import InvalidInput, SetupFailed

Step = Callable[[str, int, int], None]  # (what is being done, parts done, of how many)
Fill = Callable[[Path, Step], None]
VENV = "opt/python"
_SKIP = frozenset({"__pycache__", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"})
_STATIC = re.compile(r"config-\d.*|.*\.(a|pyc|exe)")
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_NAMES = (
    "bash sh env awk grep sed find xargs tar gzip gunzip diff ps kill pgrep which tput clear less free mount "
    "ls cat cp mv rm mkdir rmdir ln touch chmod pwd echo printf true false test [ sleep date seq sort uniq wc head tail tr "
    "cut paste tee dd df du stat id whoami hostname uname basename dirname readlink realpath mktemp md5sum sha256sum "
    "base64 od nproc timeout nohup yes expr split comm join fold nl tac rev stty tty sync install mkfifo"
)
_PROGRAMS = tuple(_NAMES.split())
_HOST_FILES = ("/etc/ld.so.cache", "/etc/mime.types", "/usr/lib/locale/C.utf8", "/usr/share/zoneinfo")
_TERMINALS = tuple(f"/lib/terminfo/{name[0]}/{name}" for name in ("dumb", "linux", "vt100", "xterm", "xterm-256color"))
_DLOPENED = ("libgcc_s.so.1",)  # by pthread_cancel(): in no list of needed libraries
_MINIMAL = ("python3.11-minimal", "libpython3.11-stdlib", "busybox-static")


def from_host(*distributions: str) -> Fill:
    """The running interpreter, its standard library, `distributions` with all that they require, and common programs."""

    def fill(root: Path, step: Step) -> None:
        for name in _MERGED:
            if os.path.islink(f"/{name}"):
                (root / f"usr/{name}").mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(f"usr/{name}")
        binaries = [Path(sys.executable).resolve(), *_programs()]
        parts = {"programs": binaries, "standard library": _standard_library(), "packages": _files_of(distributions)}
        for number, (text, paths) in enumerate(parts.items()):
            step(text, number, 5)
            for path in paths:
                _copy(path, _place(root, path))
        step("shared libraries", 3, 5)
        _link_programs(root)
        _make_venv(root)
        _copy_libraries(root, binaries)
        for path in (p for top in (*_HOST_FILES, *_TERMINALS) for p in _below(Path(top))):
            _copy(path, root / str(path).lstrip("/"))
        step("compiling byte code", 4, 5)
        compile_code(root, sysconfig.get_path("stdlib").lstrip("/"), VENV)

    return fill


def from_packages(*packages: str) -> Fill:
    """Debian packages and all that they depend on, for an image without this host's files."""

    def fill(root: Path, step: Step) -> None:
        from fumehood.runtime.microvm import debian

        debian.unpack(packages or _MINIMAL, root, step)
        busybox = root / "bin/busybox"
        for name in (n for n in _PROGRAMS if busybox.exists() and not (root / "bin" / n).exists()):
            (root / "bin" / name).symlink_to("busybox")
        if (root / "usr" / _library()).is_dir():
            compile_code(root, f"usr/{_library()}")

    return fill


def from_directory(source: Path) -> Fill:
    """The contents of a root directory, such as an unpacked OCI image. Set-user-ID bits and device nodes are left out."""

    def fill(root: Path, step: Step) -> None:
        step(f"copying {source}", 0, 1)
        if not source.is_dir():
            raise InvalidInput(f"no directory {source}", cause="it should hold a root file system", remediation="unpack one")
        try:
            shutil.copytree(source, root, symlinks=True, dirs_exist_ok=True, copy_function=_copy_plain)
        except (OSError, shutil.Error) as e:
            raise SetupFailed(f"{source} can't be copied", cause=str(e)[:500]) from None

    return fill


def compile_code(root: Path, *places: str) -> None:
    """Byte code for what lies in `places`. For trees that we made ourselves: links in them are followed.

    In a process with a fixed hash seed: the order of a set's constants is written into byte code. unchecked-hash, since all
    times in the image are the same and nothing in it ever changes.
    """
    mode = ["--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
    command = [sys.executable, "-s", "-m", "compileall", "-q", *mode, *(str(root / place) for place in places)]
    # Some files of the standard library and of packages are not meant to compile; the rest is compiled all the same.
    subprocess.run(command, env={"PYTHONHASHSEED": "0"}, capture_output=True)


def _copy_plain(source: str, target: str) -> None:
    if os.path.isfile(source):  # else a device, fifo or socket
        shutil.copyfile(source, target)
        os.chmod(target, os.stat(source).st_mode & 0o1777)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def _place(root: Path, path: Path) -> Path:
    """Packages of the environment go to VENV, everything else where it is here."""
    for site in map(Path, {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        if path.is_relative_to(site):
            return root / VENV / _library() / "site-packages" / path.relative_to(site)
    return root / str(path).lstrip("/")


def _library() -> str:
    return f"lib/python{sys.version_info.major}.{sys.version_info.minor}"


def _below(top: Path) -> Iterator[Path]:
    """The files at or below `top`, without tests and what is made again."""
    if top.is_file():
        yield top
    for entry in sorted(top.iterdir()) if top.is_dir() else ():
        if entry.name not in _SKIP and not _STATIC.fullmatch(entry.name):
            yield from _below(entry)


def _standard_library() -> Iterator[Path]:
    return (p for p in _below(Path(sysconfig.get_path("stdlib"))) if "site-packages" not in p.parts)


def _programs() -> list[Path]:
    found = {Path(path).resolve() for name in _PROGRAMS if (path := shutil.which(name, path="/usr/bin:/bin"))}
    return sorted(found)


def _link_programs(root: Path) -> None:
    """Those that are another name of a file, such as sh: where this host has links, possibly through /etc/alternatives."""
    for name in _PROGRAMS:
        path, link = shutil.which(name, path="/usr/bin:/bin"), root / "usr/bin" / name
        if path and not link.exists():
            link.symlink_to(os.path.realpath(path))


def _make_venv(root: Path) -> None:
    """As this environment is one to its base: libraries are found, and the base's own packages are not."""
    venv, python = root / VENV, Path(sys.executable).resolve()
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / _library() / "site-packages").mkdir(parents=True, exist_ok=True)
    (venv / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(python)


def _files_of(distributions: Iterable[str]) -> Iterator[Path]:
    for name in sorted(_closure(distributions)):
        for file in metadata.distribution(name).files or ():
            path = Path(str(file.locate()))
            if ".." not in file.parts and not _SKIP.intersection(file.parts) and path.is_file() and path.suffix != ".pyc":
                yield path


def _closure(wanted: Iterable[str]) -> set[str]:
    """Raises SetupFailed for one that is asked for and not installed; requirements for other systems are skipped."""
    found, pending = set[str](), list(wanted)
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            raise SetupFailed(
                f"{name} is not installed here", cause="the image gets its copy", remediation="pip install fumehood[data]"
            ) from None
        found.add(name)
        pending += [m[0] for r in requires if (m := re.match(r"[\w.-]+", r)) and _applies(r, m[0])]
    return found


def _applies(requirement: str, name: str) -> bool:
    _, _, marker = requirement.partition(";")
    if not marker:
        return True
    try:
        return "extra" not in marker and bool(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return False


def _copy_libraries(root: Path, binaries: Sequence[Path]) -> None:
    objects = [p for p in root.rglob("*.so*") if p.is_file() and not p.is_symlink()]
    done = subprocess.run(["ldd", *map(str, [*binaries, *objects])], capture_output=True, text=True)
    needed = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE))
    libraries = {Path(p) for p in needed if not p.startswith(f"{root}/")}
    libraries |= {path for p in libraries for name in _DLOPENED if (path := p.parent / name).exists()}
    for path in sorted(libraries):
        target = root / str(path.parent.resolve()).lstrip("/") / path.name
        if not target.exists():
            _copy(path, target)
