"""What one execution changed in the workspace: a walk before, a walk after.

Cheap rather than exact: size, time, inode and mode are compared, not contents, and the walk stops at a cap. This is the
guest's own report (H16); a host that needs proof looks at the file system itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

MAX_ENTRIES = 10_000
MAX_CHANGES = 1_000

Print = tuple[int, int, int, int]  # inode, size, mtime and ctime in ns


class Scan(NamedTuple):
    files: dict[str, Print]
    truncated: bool


_NOTHING = Scan({}, truncated=False)
_TICK_S = 1.0  # more than a tick ever takes


class Workspace:
    """The directory `home`, scanned again and again. That nothing is in it still is seen by one stat(), where a walk is five
    system calls, in an emulated guest 5 ms before a run and 5 ms after it.
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._empty: tuple[int, int] | None = None  # its inode and ctime when nothing was in it

    def scan(self) -> Scan:
        try:
            before = os.stat(self._home)
        except OSError:  # gone, which some tiers can't prevent
            return scan(self._home)
        seen = (before.st_ino, before.st_ctime_ns)  # not mtime, which utime(2) can put back
        if seen == self._empty:
            return _NOTHING
        found = scan(self._home)
        # Two links: no directory in it. A time stamp is as fine as the kernel's tick, so a fresh one could hide a change.
        is_empty = found == _NOTHING and before.st_nlink == 2 and abs(time.time() - before.st_ctime) > _TICK_S
        self._empty = seen if is_empty else None
        return found


def scan(home: str) -> Scan:
    """Files and links under home (not the directories themselves), at most MAX_ENTRIES entries looked at."""
    walk, files = _walk(home), dict[str, Print]()
    try:
        files.update((path, found) for path, found in islice(walk, MAX_ENTRIES) if found is not None)
        return Scan(files, next(walk, None) is not None)
    except OSError:  # no descriptor or memory left to look any further: the answer says so
        return Scan(files, True)


def _walk(home: str) -> Iterator[tuple[str, Print | None]]:
    pending = [home]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                        yield entry.path, None
                    else:
                        s = entry.stat(follow_symlinks=False)
                        yield entry.path, (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # the code runs while we look: a directory may be gone, or closed to its own owner


def difference(before: Scan, after: Scan) -> dict[str, Any]:
    """The `changed` keys of an END. Of a walk that stopped early only what both saw can be compared."""
    old, new = before.files, after.files
    partial = before.truncated or after.truncated
    changed = [{"path": p, "kind": "modified", "size": new[p][1]} for p in new if p in old and new[p] != old[p]]
    if not partial:
        changed += [{"path": p, "kind": "created", "size": new[p][1]} for p in new if p not in old]
        changed += [{"path": p, "kind": "removed", "size": 0} for p in old if p not in new]
    changed.sort(key=lambda c: str(c["path"]))
    if partial or len(changed) > MAX_CHANGES:
        return {"changed": changed[:MAX_CHANGES], "changed_truncated": True}
    return {"changed": changed}
