"""What the native tier states about each mechanism on this host. Probed once for a supervisor; part of every Result."""

from __future__ import annotations

from fumehood.model import Enforcement, Limits, Protection
from fumehood.runtime.host import cgroup_protections, watchdog
from fumehood.runtime.host.accounting import has_groups
from fumehood.runtime.host.cgroup_layout import Layout
from fumehood.runtime.native import confinement

ENFORCED, DEGRADED = Enforcement.ENFORCED, Enforcement.DEGRADED
# Steps of the recipe that fail the whole creation when they fail: there is no sandbox without them.
_ALWAYS = {
    "pid-namespace": "its own process tree, whose end is the sandbox's",
    "mount-namespace": "its own root, pivoted into; inherited mounts are locked",
    "network-namespace": "loopback only, no route",
    "uts-namespace": "its own host name",
    "ipc-namespace": "no System V or POSIX queue of another sandbox",
    "user-namespace": "its capabilities mean nothing outside, and all are dropped",
    "cgroup-namespace": "sees its own cgroup as the root",
    "read-only-root": "every bind read-only, nosuid, nodev; only its tmpfs is writable",
    "masked-proc": "an allow-list of /proc; /sys is empty",
    "disk": "one tmpfs limited in bytes and inodes",
}


def probe(layout: Layout, *, rootless: bool) -> tuple[Protection, ...]:
    rows = [Protection(name, ENFORCED, detail) for name, detail in _ALWAYS.items()]
    rows += confinement.protections()
    rows.append(_distinct_uid(rootless=rootless))
    rows += _cgroups(layout)
    return tuple(rows)


def of_sandbox(host: tuple[Protection, ...], account: tuple[Protection, ...]) -> tuple[Protection, ...]:
    """The host's rows, those of the accounting as they came out for this sandbox's own limits."""
    own = {p.name: p for p in account}
    return tuple(own.get(p.name, p) for p in host)


def _distinct_uid(*, rootless: bool) -> Protection:
    if rootless:
        detail = "all sandboxes share your host uid; user and pid namespaces keep them apart"
        return Protection("distinct-uid", DEGRADED, detail, "run the supervisor as root")
    return Protection("distinct-uid", ENFORCED, "a host uid of its own for each sandbox")


def _cgroups(layout: Layout) -> tuple[Protection, ...]:
    """Without cgroups of our own, memory and pids are watched by the supervisor, which can only react."""
    if has_groups(layout):
        return cgroup_protections.protections(layout, Limits(), frozenset())
    return watchdog.protections()
