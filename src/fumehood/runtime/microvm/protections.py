"""What the microVM tier states about each mechanism: for most the boundary is the machine's own kernel, and the monitor's jail
behind it.
"""

from __future__ import annotations

from fumehood.model import Enforcement, Limits, Protection
from fumehood.runtime.host import cgroup_protections, watchdog
from fumehood.runtime.host.accounting import has_groups
from fumehood.runtime.host.cgroup_layout import Layout

ENFORCED, DEGRADED, OFF = Enforcement.ENFORCED, Enforcement.DEGRADED, Enforcement.OFF
_OWN_KERNEL = {
    "own-kernel": "a kernel of its own: the host's is reached through the monitor alone",
    "pid-namespace": "no process of the host, or of another sandbox, exists in it",
    "mount-namespace": "no file system of the host is mounted in it",
    "network-namespace": "it has no network device; the monitor's namespace has none either",
    "uts-namespace": "its own host name",
    "ipc-namespace": "no queue or shared memory of another",
    "user-namespace": "its users mean nothing outside",
    "cgroup-namespace": "its own groups",
    "read-only-root": "its disk is opened read-only on the host, and mounted read-only",
    "masked-proc": "what it shows is the guest's; the guest's PID 1 is another user's",
    "no-new-privs": "user code starts with it",
    "capabilities": "user code has none; PID 1 alone has",
    "disk": "one tmpfs limited in bytes, in the machine's memory",
    "pids": "a group of the guest's kernel",
    "memory": "the machine has no more, and a group of the guest's kernel",
    "freezer": "its processors are stopped",
}
_NOT_IN_MACHINES = "use the tier native, where the host's own kernel is what user code calls"


def state(layout: Layout, *, rootless: bool, jailed: str) -> tuple[Protection, ...]:
    """`jailed`: what keeps the monitor in, empty for nothing."""
    rows = [Protection(name, ENFORCED, detail) for name, detail in _OWN_KERNEL.items()]
    rows.append(Protection("monitor-jail", ENFORCED if jailed else OFF, jailed, "" if jailed else "run the supervisor as root"))
    rows.append(
        Protection(
            "seccomp", DEGRADED, "the monitor has a filter; user code's calls reach the guest's kernel", _NOT_IN_MACHINES
        )
    )
    rows.append(Protection("landlock", OFF, "not in the guest: its user owns all that it can write", _NOT_IN_MACHINES))
    rows.append(Protection("syscall-count", OFF, "the guest's refusals are not counted", _NOT_IN_MACHINES))
    rows.append(
        Protection("distinct-uid", DEGRADED, "all monitors have your uid", "run the supervisor as root")
        if rootless
        else Protection("distinct-uid", ENFORCED, "a host uid of its own for each monitor")
    )
    own = {row.name for row in rows}
    of_host = cgroup_protections.protections(layout, Limits(), frozenset()) if has_groups(layout) else watchdog.protections()
    return (*rows, *(row for row in of_host if row.name not in own))
