"""What the cgroups of a sandbox protect, stated for the Result (H13)."""

from __future__ import annotations

from fumehood.model import Enforcement, Limits, Protection
from fumehood.runtime.host.cgroup_layout import Layout

FIX = (
    "run the supervisor as root, or start it with systemd-run --user --scope -p Delegate=yes; as a system service: Delegate=yes"
)
_CONTROLLER = {
    "cpu": "cpu",
    "memory": "memory",
    "swap": "memory",
    "pids": "pids",
    "block-io": "io",
    "freezer": "freezer",
}


def protections(layout: Layout, limits: Limits, absent: frozenset[str]) -> tuple[Protection, ...]:
    """`absent` names the protections whose file this kernel lacks."""
    return tuple(_protection(name, layout, limits, absent) for name in _CONTROLLER)


def _protection(name: str, layout: Layout, limits: Limits, absent: frozenset[str]) -> Protection:
    place = layout.places.get(_CONTROLLER[name])
    if place is None:
        return Protection(name, Enforcement.OFF, layout.missing[_CONTROLLER[name]], FIX)
    where = f"cgroup v{place.version}"
    if name in absent:
        fix = "boot with swapaccount=1, or switch the host's swap off"
        return Protection(name, Enforcement.DEGRADED, f"{where}, but this kernel does not count swap", fix)
    if name == "block-io":
        return _block_io(where, layout.device, limits)
    return Protection(name, Enforcement.ENFORCED, where)


def _block_io(where: str, device: str | None, limits: Limits) -> Protection:
    if not (limits.io_read_bps or limits.io_write_bps):
        return Protection("block-io", Enforcement.OFF, "no throttle was asked for", "set io_read_bps or io_write_bps")
    if device is None:
        detail = "the state directory is on no disk that could be throttled"
        return Protection("block-io", Enforcement.OFF, detail, "move the state directory to a disk's file system")
    if where.endswith("1"):
        detail = f"{where} throttles reads and direct writes, not what the page cache writes back later"
        return Protection("block-io", Enforcement.DEGRADED, detail, "boot with cgroup v2")
    return Protection("block-io", Enforcement.ENFORCED, f"{where} on {device}")
