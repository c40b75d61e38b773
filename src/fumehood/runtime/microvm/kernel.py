"""Guest kernels, each published as an asset:

small   built from the distribution's kernel source and guest/base.config: what guests boot with on a normal host
pvm     the same with guest/pvm.config and the edits of pvm.py, for hosts of the kvm_pvm kind; the self-test alone chooses it
stock   the distribution's own binary kernel with an initramfs: nothing to compile, boots slower
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fumehood.errors import InvalidInput, SetupFailed
from fumehood.runtime.microvm import debian, stock
from fumehood.runtime.microvm.assets import Assets, Facts, Manifest
from fumehood.runtime.microvm.pvm import PVM_EDITS, Edit

Step = Callable[[str, int, int], None]
SOURCE_PACKAGE = "linux-source-6.1"
VMLINUX, BZIMAGE, INITRD = "vmlinux", "bzImage", "initrd"
_GUEST = Path(__file__).with_name("guest")
_NEED_BYTES = 4 << 30
_TOOLS = ("make", "gcc", "ld", "flex", "bison", "bc", "xz", "tar", "strip")
_HEADERS = ("libelf.h", "openssl/opensslv.h")
_INSTALL = "apt-get install --no-install-recommends gcc make flex bison bc libelf-dev libssl-dev xz-utils"
_REPRODUCIBLE = {"KBUILD_BUILD_TIMESTAMP": "2001-09-09", "KBUILD_BUILD_USER": "fumehood", "KBUILD_BUILD_HOST": "fumehood"}
_OTHER_SOURCE = f"use the {SOURCE_PACKAGE} of Debian 12"
# Two thirds of the source, of which no guest has anything: files that are neither written nor removed. Kconfig reads its own
# of all architectures and drivers.
_LEFT_PACKED = (
    *("Documentation/*.rst", "arch/[!x]*.[chS]", "arch/*.dts*", "sound/*.[ch]", "tools/perf/*.[ch]", "tools/testing/*.[ch]"),
    *("drivers/gpu/*.[ch]", "drivers/infiniband/*.[ch]", "drivers/media/*.[ch]", "drivers/net/ethernet/*.[ch]"),
    *("drivers/net/wireless/*.[ch]", "drivers/pinctrl/*.[ch]", "drivers/scsi/*.[ch]", "drivers/staging/*.[ch]"),
)
_OBJECTS = 900  # compiled files, roughly: for a progress bar

_COMMON_ARGS = "console=ttyS0 quiet reboot=k panic=1 root=/dev/vda ro rootfstype=ext4 init=/sbin/init random.trust_cpu=on"
# Features that kvm_pvm tells the guest of and does not emulate in its kernel mode (measured, one by one). Which of its clock's
# facts the host has to add: tsc_early_khz and lpj, since calibration fails under emulation.
_PVM_ARGS = (
    "nokaslr nopti mitigations=off no_timer_check noxsave tsc=reliable "
    "clearcpuid=cx16,popcnt,smap,smep,umip,erms,fsrm,rdtscp,pcid,invpcid,fsgsbase"
)


@dataclass(frozen=True)
class Profile:
    fragments: tuple[str, ...]
    edits: tuple[Edit, ...]
    boot_args: str
    files: Mapping[str, str]  # name in the asset: place in the build tree
    acpi: bool = False  # whether the machine's devices are found in ACPI tables, else on the kernel's command line


_ELF, _COMPRESSED = {VMLINUX: "vmlinux"}, {BZIMAGE: "arch/x86/boot/bzImage"}
PROFILES: Mapping[str, Profile] = {
    # bzImage for QEMU: its decompressor is what moves the kernel (KASLR); Firecracker starts the ELF file.
    "small": Profile(("base.config",), (), _COMMON_ARGS, _ELF | _COMPRESSED),
    "pvm": Profile(("base.config", "pvm.config"), PVM_EDITS, f"{_COMMON_ARGS} {_PVM_ARGS}", _ELF),
    "stock": Profile((), (), _COMMON_ARGS, {}, acpi=True),
}


def build_kernel(assets: Assets, name: str, step: Step = lambda text, done, total: None, jobs: int = 0) -> Manifest:
    """Makes and publishes the kernel of profile `name`; `jobs` compilers at once, 0 = one for each CPU.

    facts: version, source, inputs, boot_args, acpi. Raises InvalidInput for another profile,
    SetupFailed for what is missing on this host or does not fit the source, CapacityExceeded when the disk is too full.
    """
    if name not in PROFILES:
        raise InvalidInput(f"no kernel profile {name!r}", cause=f"known: {', '.join(PROFILES)}")
    profile = PROFILES[name]

    known = {"inputs": inputs(name), "boot_args": profile.boot_args, "acpi": profile.acpi}

    def make(directory: Path) -> Facts:
        if not profile.fragments:
            return {**known, **stock.make(directory, step)}
        with tempfile.TemporaryDirectory(prefix=".linux-", dir=directory) as scratch:
            return {**known, **_compile(profile, Path(scratch), directory, step, jobs or os.cpu_count() or 1)}

    return assets.publish("kernels", name, make, _NEED_BYTES)


def inputs(name: str) -> str:
    """A digest of what this version of fumehood puts into that kernel: another one calls for a new build."""
    profile = PROFILES[name]
    texts = [(_GUEST / fragment).read_text() for fragment in profile.fragments] or [(_GUEST / "stock-init").read_text()]
    return hashlib.sha256(repr((texts, profile.edits)).encode()).hexdigest()


def _compile(profile: Profile, tree: Path, directory: Path, step: Step, jobs: int) -> Facts:
    _check_tools()
    source = _unpack_source(tree, step)
    for edit in profile.edits:
        apply(tree, edit)
    configure(tree, [_GUEST / name for name in profile.fragments])
    _make(tree, [f"-j{jobs}", *(Path(place).name for place in profile.files.values())], step)
    for name, place in profile.files.items():
        shutil.copyfile(tree / place, directory / name)
    if VMLINUX in profile.files:
        _run(["strip", str(directory / VMLINUX)], tree)
    version = _run(["make", "-s", "kernelrelease"], tree).strip()
    return {"version": version, "source": source}


def _check_tools() -> None:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    include = [Path("/usr/include"), *Path("/usr/include").glob("*-linux-gnu")]
    missing += [header for header in _HEADERS if not any((place / header).exists() for place in include)]
    if missing:
        raise SetupFailed("a kernel can't be built here", cause=f"missing: {', '.join(missing)}", remediation=_INSTALL)


def _unpack_source(tree: Path, step: Step) -> str:
    """The source's package version. What is installed is taken, else it is fetched."""
    with tempfile.TemporaryDirectory(prefix=".source-", dir=tree.parent) as scratch:
        tarball = Path("/usr/src", f"{SOURCE_PACKAGE}.tar.xz")
        if not tarball.exists():
            debian.unpack([SOURCE_PACKAGE], Path(scratch), step, closure=False)
            tarball = Path(scratch, "usr/src", tarball.name)
        step("unpacking the kernel's source", 0, 1)
        left = [f"--exclude={SOURCE_PACKAGE}/{pattern}" for pattern in _LEFT_PACKED]
        _run(["tar", "xf", str(tarball), "--strip-components=1", *left, "-C", str(tree)], tree)
    return _run(["make", "-s", "kernelversion"], tree).strip()


def apply(tree: Path, edit: Edit) -> None:
    """Raises SetupFailed unless the old text is there exactly once: a source that has changed needs another look."""
    path = tree / edit.path
    text = path.read_text() if path.exists() else ""
    if text.count(edit.old) != 1:
        raise SetupFailed(
            f"an edit of {edit.path} does not fit this kernel source",
            cause=f"the text to replace is there {text.count(edit.old)} times, not once",
            remediation=_OTHER_SOURCE,
        )
    path.write_text(text.replace(edit.old, edit.new))


def configure(tree: Path, fragments: list[Path]) -> None:
    """tinyconfig and the fragments, the later ones on top. Raises SetupFailed when a line did not come true."""
    _run(["make", "-s", "tinyconfig"], tree)
    with (tree / ".config").open("a") as config:
        config.writelines(fragment.read_text() for fragment in fragments)
    _run(["make", "-s", "olddefconfig"], tree)
    asked = dict(setting for fragment in fragments for setting in settings(fragment.read_text()))
    real = dict(settings((tree / ".config").read_text()))
    wrong = [f"{option} is {real.get(option)}, not {value}" for option, value in asked.items() if real.get(option) != value]
    if wrong:
        raise SetupFailed("the configuration did not take", cause="; ".join(wrong), remediation=_OTHER_SOURCE)


def settings(config: str) -> Iterator[tuple[str, str | None]]:
    """(option, value) of each line; None for "is not set"."""
    for line in config.splitlines():
        if found := re.fullmatch(r"(CONFIG_\w+)=(.*)", line):
            yield found[1], found[2]
        elif found := re.fullmatch(r"# (CONFIG_\w+) is not set", line):
            yield found[1], None


def _make(tree: Path, targets: list[str], step: Step) -> None:
    command, done = ["make", *targets], 0
    with (tree / "build.log").open("w+") as log:
        with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment()) as process:
            try:
                for line in process.stdout or ():
                    done += line.lstrip().startswith(("CC ", "AS "))
                    step("compiling the kernel", min(done, _OBJECTS), _OBJECTS)
            except BaseException:
                process.terminate()  # make ends its compilers
                raise
        if process.returncode:
            log.seek(0)
            raise SetupFailed("the kernel did not compile", cause=log.read()[-1000:].strip(), remediation=_INSTALL)


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise SetupFailed(f"{' '.join(command[:3])} failed", cause=done.stderr.strip()[-1000:], remediation=_INSTALL)
    return done.stdout


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", **_REPRODUCIBLE}
