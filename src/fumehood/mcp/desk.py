"""The sandboxes of one MCP session. What is not on a session's desk does not exist for it (H14)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from fumehood.client.core import by_name
from fumehood.client.sandbox import AsyncSandbox
from fumehood.client.snapshots import Snapshot, is_checkpoint
from fumehood.errors import CapacityExceeded, Forbidden, NotFound
from fumehood.model import check_id

MAX_SANDBOXES = 8  # of one session: a model in a loop must not take the host from the others
MAX_SNAPSHOTS = 4  # likewise: each takes as much of the disk as its sandbox takes of the memory
_PRESETS_ONLY = "a policy is chosen by a preset's name; files and documents are the operator's to choose"


class Desk:
    """Made for each session. `sandbox` are AsyncSandbox's arguments: the operator's choice, which no tool can weaken."""

    def __init__(self, sandbox: Mapping[str, Any]) -> None:
        self._sandbox = dict(sandbox)
        self._boxes: dict[str, AsyncSandbox] = {}
        self._snapshots: list[str] = []  # the oldest first
        self._default: str | None = None
        self._opening = asyncio.Lock()
        self._closed = False

    async def box(self, sandbox_id: str | None) -> AsyncSandbox:
        """The named one; None = the default, made on first use. Raises NotFound also for other sessions' ids."""
        if sandbox_id is not None:
            return self._named(sandbox_id)
        async with self._opening:  # two first calls at once share one default
            if self._default is None:
                self._default = await self._open(self._sandbox)
            return self._boxes[self._default]

    async def create(self, policy: str | None, env: Mapping[str, str] | None) -> str:
        """A further sandbox. Raises Forbidden for a policy where the operator has fixed one, CapacityExceeded."""
        chosen = dict(self._sandbox)
        if policy is not None:
            chosen["policy"] = self._allowed(policy)
        if env:
            chosen["env"] = {**chosen.get("env", {}), **env}
        async with self._opening:
            return await self._open(chosen)

    async def snapshot(self, sandbox_id: str | None) -> tuple[Snapshot, list[str]]:
        """A new one, and the older ones that were forgotten for it."""
        box = await self.box(sandbox_id)
        async with self._opening:
            self._refuse_when_closed()
            made = await box.snapshot()
            self._snapshots.append(made.id)
            return made, await self._forget(keep=MAX_SNAPSHOTS)

    async def rollback(self, sandbox_id: str | None, name: str) -> None:
        """To a checkpoint, or a snapshot of this session. Raises NotFound also for snapshots of others."""
        box = await self.box(sandbox_id)
        if not is_checkpoint(name) and name not in self._snapshots:
            raise NotFound(
                f"no checkpoint or snapshot {name[:40]!r} in this session",
                cause=f"it never was, or is not among the newest {MAX_SNAPSHOTS}",
                remediation="give what checkpoint or snapshot returned",
            )
        await box.rollback(name)

    async def fork(self, sandbox_id: str | None, count: int) -> list[str]:
        box = await self.box(sandbox_id)
        async with self._opening:
            self._check_room(count)
            forks = await box.fork(count)
            self._boxes |= {fork.id: fork for fork in forks}
        return [fork.id for fork in forks]

    def ids(self) -> list[str]:
        return list(self._boxes)

    def is_default(self, sandbox_id: str) -> bool:
        return sandbox_id == self._default

    async def end(self, sandbox_id: str) -> None:
        """Also when it had died by itself: its next use as the default makes a new one."""
        box = self._named(sandbox_id)
        del self._boxes[sandbox_id]
        if self._default == sandbox_id:
            self._default = None
        await box.close()

    async def aclose(self) -> None:
        self._closed = True
        async with self._opening:  # one that is just being made is ended too
            boxes, self._boxes = list(self._boxes.values()), {}
        closed = await asyncio.gather(*(box.close() for box in boxes), return_exceptions=True)
        forgotten = await asyncio.gather(self._forget(keep=0), return_exceptions=True)
        for failure in (o for o in (*closed, *forgotten) if isinstance(o, BaseException)):
            raise failure

    def _named(self, sandbox_id: str) -> AsyncSandbox:
        box = self._boxes.get(check_id(sandbox_id, "sandbox id"))
        if box is None:
            raise NotFound(
                f"no sandbox {sandbox_id} in this session",
                cause="it never was, it has ended, or it belongs to another session",
                remediation="list_sandboxes shows yours; leave sandbox_id out for the default one",
            )
        return box

    async def _forget(self, keep: int) -> list[str]:
        where = {name: self._sandbox[name] for name in ("url", "api_key", "tier") if name in self._sandbox}
        forgotten = self._snapshots[: max(0, len(self._snapshots) - keep)]
        for snapshot_id in forgotten:
            with contextlib.suppress(NotFound):  # its owner was faster, at the server
                await AsyncSandbox.discard_snapshot(snapshot_id, **where)
            self._snapshots.remove(snapshot_id)
        return forgotten

    async def _open(self, arguments: Mapping[str, Any]) -> str:
        self._check_room(1)
        box = await AsyncSandbox(**arguments).open()
        self._boxes[box.id] = box
        return box.id

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise CapacityExceeded("this session is ending", remediation="open another")

    def _check_room(self, count: int) -> None:
        self._refuse_when_closed()
        if len(self._boxes) + count > MAX_SANDBOXES:
            raise CapacityExceeded(
                f"this session holds {len(self._boxes)} sandboxes",
                cause=f"a session may have {MAX_SANDBOXES}",
                remediation="end one with kill_sandbox",
            )

    def _allowed(self, policy: str) -> str:
        if self._sandbox.get("policy") not in (None, policy):
            raise Forbidden(
                "the policy is fixed by who runs this server",
                cause="it was started with one",
                remediation="leave policy out",
            )
        if not by_name(policy):
            raise Forbidden(f"not a preset: {policy[:64]!r}", cause=_PRESETS_ONLY, remediation="name a preset, such as strict")
        return policy
