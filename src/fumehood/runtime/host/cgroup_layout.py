"""Which controllers this host offers, in which version, and where a subtree may be made. `probe` only reads."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fumehood.runtime.host.cgroup_tree import step
from fumehood.runtime.host.cgroup_v2 import CORE, enable, vacate

CONTROLLERS = ("pids", "memory", "cpu", "cpuacct", "io", "freezer")  # also the order of attaching
_V1_NAME = {"io": "blkio"}
OURS = "fumehood"
_MARKS = ("trusted.delegate", "user.delegate")  # systemd: Delegate= of systemd.resource-control(5)
_Mount = tuple[str, str, str, list[str]]
_PREPARING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Place:
    """`base` is the directory below which `fumehood/<instance>/<sandbox>` is made."""

    version: int
    base: str

    def of(self, *names: str) -> str:
        return "/".join((self.base, OURS, *names))


@dataclass(frozen=True, slots=True)
class Layout:
    """`places` by controller; `missing` has a reason for each of the others. `device` is major:minor or None."""

    places: Mapping[str, Place]
    missing: Mapping[str, str]
    device: str | None

    @property
    def mode(self) -> str:
        versions = {place.version for place in self.places.values()}
        return "none" if not versions else "hybrid" if len(versions) == 2 else f"v{versions.pop()}"

    def by_place(self) -> dict[Place, list[str]]:
        """Controllers that share a hierarchy share a directory."""
        places: dict[Place, list[str]] = {}
        for name in CONTROLLERS:
            if place := self.places.get(name):
                places.setdefault(place, []).append(name)
        return places


def settle(root: str = "/sys/fs/cgroup", mounts: str = "/proc/self/mountinfo", own: str = "/proc/self/cgroup") -> None:
    """Leave our own group, if systemd delegated it to us, for one below it: it can't hand controllers down while processes
    live in it. What DelegateSubgroup= does from systemd 254 on. Raises SetupFailed.
    """
    here = next(iter(_above(_unified(list(_mounts(root, mounts))), own)), None)
    if here is None or not _writable(here, "cgroup.procs", "cgroup.subtree_control") or not _is_delegated(here):
        return
    if _hands_down(here) or "memory" not in _words(here, "cgroup.controllers"):
        return
    with step(f"leave {here}"):
        vacate(here)


def probe(
    root: str = "/sys/fs/cgroup",
    mounts: str = "/proc/self/mountinfo",
    own: str = "/proc/self/cgroup",
    state_dir: str = "/tmp",
) -> Layout:
    """v1 where a controller is mounted there and may be written, else v2 where it is delegated, else missing."""
    table = list(_mounts(root, mounts))
    v1 = {name: point for point, fstype, _, options in table if fstype == "cgroup" for name in options}
    v2 = _delegated(_above(_unified(table), own))
    offered = CORE | set(_words(v2, "cgroup.controllers")) if v2 else frozenset[str]()
    places: dict[str, Place] = {}
    missing: dict[str, str] = {}
    for name in CONTROLLERS:
        point = v1.get(_V1_NAME.get(name, name))
        if point and _writable(point, "cgroup.procs"):
            places[name] = Place(1, point)
        elif v2 and name in offered:
            places[name] = Place(2, v2)
        else:
            missing[name] = _why(name, point, v2)
    return Layout(places, missing, whole_disk(state_dir, mounts))


def _why(name: str, v1: str | None, v2: str | None) -> str:
    if v1:
        return f"{v1} is not writable by uid {os.geteuid()}"
    return f"{v2} does not offer {name}" if v2 else f"no {name} controller that uid {os.geteuid()} may write"


def _mounts(root: str, mountinfo: str) -> Iterator[_Mount]:
    """(mount point, file system type, root of the mount, super options) of what is mounted at or below `root`."""
    for line in Path(mountinfo).read_text().splitlines():
        before, _, after = line.partition(" - ")
        fields, (fstype, _, options) = before.split(), after.split(" ")[:3]
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])  # proc(5): \040 is a space
        if PurePosixPath(point).is_relative_to(root):
            yield point, fstype, fields[3], options.split(",")


def _unified(table: list[_Mount]) -> tuple[str, str] | None:
    return next(((point, top) for point, fstype, top, _ in table if fstype == "cgroup2"), None)


def _above(mount: tuple[str, str] | None, own: str) -> list[str]:
    """Our own v2 directory and those above it, nearest first, as far as the mount shows them."""
    line = next((x for x in Path(own).read_text().splitlines() if x.startswith("0::")), None)
    if mount is None or line is None:
        return []
    point, top = mount
    inside = PurePosixPath(line[3:])
    seen = inside.is_relative_to(top) and ".." not in inside.parts  # "/..": we are outside our cgroup namespace
    start = inside.relative_to(top) if seen else PurePosixPath()
    return [str(PurePosixPath(point, step)) for step in (start, *start.parents)]


def _delegated(above: list[str]) -> str | None:
    """The v2 directory to build in. For root: the nearest that systemd delegated to it, whose limits and end are then also
    the sandboxes', else the top. For a user: the nearest that it may write.

    It must hold no process itself: a group with processes can't hand controllers down ("no internal processes").
    """
    fits = [d for d in above if _writable(d, "cgroup.procs", "cgroup.subtree_control") and _hands_down(d)]
    wanted = ([d for d in fits if _is_delegated(d)] or fits[-1:]) if os.geteuid() == 0 else fits
    return next(iter(wanted), None)


def _is_delegated(directory: str) -> bool:
    """By systemd's mark, to us: a group of another user's is that user's to kill."""
    return os.stat(directory).st_uid == os.geteuid() and any(_attribute(directory, name) == b"1" for name in _MARKS)


def _attribute(directory: str, name: str) -> bytes:
    try:
        return os.getxattr(directory, name)
    except OSError as e:
        if e.errno in (errno.ENODATA, errno.ENOTSUP):  # ENOTSUP: user.* before Linux 5.7
            return b""
        raise


def _hands_down(directory: str) -> bool:
    is_real_root = not Path(directory, "cgroup.type").exists()  # only the true root lacks that file, and is exempt
    return is_real_root or not _words(directory, "cgroup.procs")


def _words(directory: str, file: str) -> list[str]:
    return Path(directory, file).read_text().split()


def _writable(directory: str, *files: str) -> bool:
    return os.access(directory, os.W_OK | os.X_OK) and all(os.access(f"{directory}/{f}", os.W_OK) for f in files)


def make(place: Place, controllers: list[str], instance: str, sandbox_id: str) -> str:
    """The new directory's path. Raises as `step` says."""
    path = place.of(instance, sandbox_id)
    with step(f"make {path}"), _PREPARING:  # a sandbox made before the level above hands controllers down has no limits
        try:
            os.mkdir(path)
        except FileNotFoundError:  # the first sandbox of this instance
            _prepare(place, set(controllers) - CORE if place.version == 2 else set[str](), instance)
            os.mkdir(path)
    return path


def _prepare(place: Place, handed_down: set[str], instance: str) -> None:
    """The instance's own level last: while it is not there, a later try begins anew and meets the same obstacle."""
    os.makedirs(place.of(), exist_ok=True)
    if handed_down:
        enable(place.base, handed_down)
        enable(place.of(), handed_down)
    Path(place.of(instance)).mkdir(exist_ok=True)
    if handed_down:
        enable(place.of(instance), handed_down)


def whole_disk(directory: str, mounts: str = "/proc/self/mountinfo", blocks: str = "/sys/dev/block") -> str | None:
    """major:minor of the disk under a directory; None for tmpfs, overlay and the like, which have no disk to throttle.

    blkio.throttle refuses a partition, so a partition gives its disk. Btrfs shows an anonymous device: ask its mount.
    """
    number = os.stat(directory).st_dev
    if os.major(number) == 0:
        device = f"{os.major(number)}:{os.minor(number)}"
        lines = [line.split(" - ") for line in Path(mounts).read_text().splitlines()]
        source = next((after.split(" ")[1] for before, after in lines if before.split()[2] == device), "")
        if not source.startswith("/dev/") or not Path(source).is_block_device():
            return None
        number = os.stat(source).st_rdev
    node = Path(f"{blocks}/{os.major(number)}:{os.minor(number)}").resolve()
    if (node / "partition").exists():
        node = node.parent
    return (node / "dev").read_text().strip() if (node / "dev").exists() else None
