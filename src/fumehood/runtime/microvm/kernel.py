"""Guest kernels, each published as an asset:

small   built from the distribution's kernel source and guest/base.config: what guests boot with on a normal host
pvm     the same with guest/pvm.config and three edits, for hosts of the kvm_pvm kind; the self-test alone chooses it
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
_OBJECTS = 900  # compiled files, roughly: for a progress bar

_COMMON_ARGS = "console=ttyS0 quiet reboot=k panic=1 root=/dev/vda ro rootfstype=ext4 init=/sbin/init random.trust_cpu=on"
# Features that kvm_pvm tells the guest of and does not emulate in its kernel mode (measured, one by one). Which of its clock's
# facts the host has to add: tsc_early_khz and lpj, since calibration fails under emulation.
_PVM_ARGS = (
    "nokaslr nopti mitigations=off no_timer_check noxsave tsc=reliable "
    "clearcpuid=cx16,popcnt,smap,smep,umip,erms,fsrm,rdtscp,pcid,invpcid,fsgsbase"
)


@dataclass(frozen=True)
class Edit:
    path: str
    old: str
    new: str


def _at_once(left: str, second: str, seconds: str, then: str) -> tuple[str, str]:
    """The loop that counts the seconds in `left`, and the same after a division that leaves it a few."""
    loop = f"\twhile ({left} >= {second}) {{{then}"
    whole = f"\t\tu64 whole = {left} / {second} - 1;\n\n\t\t{left} -= whole * {second};\n\t\t{seconds} += whole;\n"
    return loop, f"\tif ({left} >= 16 * {second}) {{\n{whole}\t}}\n{loop}"


# What a plain Linux 6.1 lacks as a guest of kvm_pvm.
PVM_EDITS = (
    # int3 in kernel mode is not emulated: the boot's own test of it would be the end.
    Edit("arch/x86/kernel/alternative.c", "\tint3_selftest();\n", ""),
    # fwait is not emulated, and fpu__drop() runs it whenever a process ends.
    Edit("arch/x86/kernel/fpu/core.c", 'asm volatile("1: fwait\\n"', 'asm volatile("1: nop\\n"'),
    # SYSCALL sets RIP to LSTAR, RCX and R11, but leaves CPL 3, so that the first fetch of the entry point is a page fault of
    # user mode at entry_SYSCALL_64. Do the system call from there. A process that jumps there by itself makes a call, no more.
    Edit(
        "arch/x86/mm/fault.c",
        "#include <asm/trace/exceptions.h>",
        "#include <asm/syscall.h>\n#include <asm/proto.h>\n#include <asm/trace/exceptions.h>",
    ),
    Edit(
        "arch/x86/mm/fault.c",
        "\tprefetchw(&current->mm->mmap_lock);\n\n\t/*\n\t * KVM uses #PF vector",
        "\tif (user_mode(regs) && regs->ip == (unsigned long)entry_SYSCALL_64) {\n"
        "\t\tregs->ip = regs->cx;\n"
        "\t\tregs->flags = (regs->r11 & 0x250dd5) | X86_EFLAGS_IF | X86_EFLAGS_FIXED;\n"
        "\t\tregs->orig_ax = regs->ax;\n"
        "\t\tregs->ax = -ENOSYS;\n"
        "\t\tdo_syscall_64(regs, regs->orig_ax);\n"
        "\t\treturn;\n"
        "\t}\n\n"
        "\tprefetchw(&current->mm->mmap_lock);\n\n\t/*\n\t * KVM uses #PF vector",
    ),
    # Its TSC is the host's, so after a restore all that went by since the snapshot comes at once, and is counted in steps of a
    # second: 60 us each, 5 s for a snapshot of yesterday. Count 300 s in a step, as many as its nanoseconds have room for
    # (ntp_error is a difference, right whatever overflows on the way), and their seconds together; leap seconds matter to no
    # one here.
    Edit(
        "kernel/time/timekeeping.c",
        "maxshift = (64 - (ilog2(ntp_tick_length())+1)) - 1;",
        "maxshift = 62 - ilog2(tk->xtime_interval);",
    ),
    Edit("kernel/time/timekeeping.c", *_at_once("tk->tkr_mono.xtime_nsec", "nsecps", "tk->xtime_sec", "\n\t\tint leap;")),
    Edit("kernel/time/timekeeping.c", *_at_once("tk->tkr_raw.xtime_nsec", "snsec_per_sec", "tk->raw_sec", "")),
    # The same time that went by has the neighbour table draw new random times, for which the generator is keyed anew: 20,000
    # instructions, before its new entropy is there. There is no network device, so there are no neighbours.
    Edit("net/core/neighbour.c", "return base ? prandom_u32_max(base) + (base >> 1) : 0;", "return base;"),
    # A restored guest forgets its connections when it hears of that, in a queue of its own. Listen there first: else it accepts
    # the host's first connection, 23,000 instructions, forgets it, and accepts the second.
    Edit(
        "net/vmw_vsock/virtio_transport.c",
        "\tmutex_lock(&vsock->rx_lock);\n\n\tif (!vsock->rx_run)\n\t\tgoto out_nofill;",
        "\tif (work_pending(&vsock->event_work))\n\t\tvirtio_transport_event_work(&vsock->event_work);\n"
        "\tmutex_lock(&vsock->rx_lock);\n\n\tif (!vsock->rx_run)\n\t\tgoto out_nofill;",
    ),
    # A tick is 2500 instructions, 1.3 ms: at 100 Hz an eighth of what a program has. 24 is the least that jiffies.h allows.
    Edit("kernel/Kconfig.hz", "\tdefault 100 if HZ_100\n", "\tdefault 25 if HZ_100\n"),
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
        _run(["tar", "xf", str(tarball), "--strip-components=1", "-C", str(tree)], tree)
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
