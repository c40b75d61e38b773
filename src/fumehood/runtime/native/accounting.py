"""What bounds and counts one sandbox: cgroups where we may make them, else a watchdog that reads /proc and reacts."""

from __future__ import annotations

from typing import Protocol

from fumehood.config import Config
from fumehood.model import Limits
from fumehood.runtime.base import Stats
from fumehood.runtime.native import cgroup, cgroup_layout
from fumehood.runtime.native.cgroup_layout import Layout


class Account(Protocol):
    """Bounds, counts, freezes. `close()` only after every process is gone."""

    def attach(self, pid: int) -> None: ...
    def reading(self) -> Stats: ...
    def freeze(self) -> None: ...
    def thaw(self) -> None: ...
    def apply(self, limits: Limits) -> None: ...
    def close(self) -> None: ...


class GroupAccount:
    def __init__(self, group: cgroup.Group) -> None:
        self._group = group
        self.attach, self.reading, self.thaw, self.apply = group.attach, group.reading, group.thaw, group.apply

    def freeze(self) -> None:
        self._group.freeze()

    def close(self) -> None:
        self._group.remove()
        self._group.close()


def layout(config: Config) -> Layout:
    return cgroup_layout.probe(state_dir=str(config.state_dir))


def open_account(where: Layout, instance: str, sandbox_id: str, limits: Limits) -> Account:
    return GroupAccount(cgroup.Group.create(where, instance, sandbox_id, limits))


def remove_instance(where: Layout, instance: str) -> None:
    cgroup.reconcile(where, instance)
