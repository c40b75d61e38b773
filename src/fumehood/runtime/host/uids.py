"""One distinct host uid per sandbox when root, so that two sandboxes share no owner for files, keys or signals (H24).

A supervisor owns a block of uids for its life by an flock on a file: the kernel releases it with the process, however
that ends, so no reconciliation is needed and two supervisors of one host never hand out the same uid.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import deque
from pathlib import Path

from fumehood.errors import CapacityExceeded

_BLOCKS = 512


class UidBlock:
    """`zygote_uid` for the zygotes; `take()`/`give()` for sandboxes, oldest first so that a uid rests before reuse."""

    def __init__(self, directory: Path, base: int, size: int) -> None:
        directory.mkdir(0o700, parents=True, exist_ok=True)
        for number in range(_BLOCKS):
            self._fd = os.open(directory / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.zygote_uid = base + number * size
                self._free = deque(range(self.zygote_uid + 1, self.zygote_uid + size))
                return
            os.close(self._fd)
        raise CapacityExceeded(f"{_BLOCKS} supervisors run on this host", remediation="stop one of them")

    def take(self) -> int:
        if not self._free:
            raise CapacityExceeded("every uid of this supervisor is in use", remediation="end a sandbox, or raise uid_count")
        return self._free.popleft()

    def give(self, uid: int) -> None:
        self._free.append(uid)

    def close(self) -> None:
        os.close(self._fd)
