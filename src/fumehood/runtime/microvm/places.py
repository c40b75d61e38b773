"""Where machines run: for each a directory beside the assets, a host uid and control groups, given back when it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

from fumehood.config import Config
from fumehood.model import MIB, Limits
from fumehood.runtime.host import accounting, journal
from fumehood.runtime.host.accounting import Account
from fumehood.runtime.host.uids import UidBlock
from fumehood.runtime.microvm.machine import Place
from fumehood.runtime.microvm.removal import remove

# What a monitor has beside its guest's memory: its own heap, device buffers, page tables, translated code (QEMU).
OVERHEAD_BYTES = 192 * MIB
_THREADS = 32


class Places:
    """Removes first what supervisors left that were killed (H19). Raises CapacityExceeded."""

    def __init__(self, config: Config) -> None:
        self.layout = accounting.layout(config)
        journal.reconcile(config.run_dir, lambda name: accounting.remove_instance(self.layout, name))
        self._instance = journal.Instance(config.run_dir)
        machines = config.state_dir / "microvm/machines"
        machines.mkdir(0o711, parents=True, exist_ok=True)
        _sweep(machines, config.run_dir / "instances")
        self.directory = machines / self._instance.name
        self.directory.mkdir(0o711)
        uids = config.run_dir / "uids"
        self._uids = UidBlock(uids, config.uid_base, config.uid_count_per_supervisor) if os.geteuid() == 0 else None

    @contextlib.asynccontextmanager
    async def taken(self, memory_bytes: int, limits: Limits) -> AsyncGenerator[tuple[Place, Account]]:
        """For a machine with `memory_bytes`, which is ended before this is left. Raises CapacityExceeded, SetupFailed."""
        name = "v" + secrets.token_hex(5)
        async with contextlib.AsyncExitStack() as undo:
            uid = self._uids.take() if self._uids else None
            if self._uids and uid is not None:
                undo.callback(self._uids.give, uid)
            account = accounting.open_account(self.layout, self._instance.name, name, monitors(limits, memory_bytes))
            undo.callback(account.close)
            directory = self.directory / name
            directory.mkdir(0o700)
            undo.callback(remove, directory)
            if uid is not None:
                os.chown(directory, uid, uid)
            yield Place(name, directory, uid, account.door_files(), limits.io_read_bps), account

    def aclose(self) -> None:
        remove(self.directory)
        accounting.remove_instance(self.layout, self._instance.name)
        if self._uids:
            self._uids.close()
        self._instance.close()


def monitors(limits: Limits, memory_bytes: int) -> Limits:
    """What the process may use whose guest is bound by `limits`. Its pids are threads; the guest's own are the guest's."""
    return replace(limits, memory_bytes=memory_bytes + OVERHEAD_BYTES, swap_bytes=0, pids=_THREADS)


def _sweep(machines: Path, alive: Path) -> None:
    for left in machines.iterdir():
        if not (alive / left.name).exists():
            remove(left)
