"""The sandboxes of one MCP session. What is not on a session's desk does not exist for it (H14)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fumehood.client.core import by_name
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import CapacityExceeded, Forbidden, NotFound
from fumehood.model import check_id

MAX_SANDBOXES = 8  # of one session: a model in a loop must not take the host from the others
_PRESETS_ONLY = "a policy is chosen by a preset's name; files and documents are the operator's to choose"


class Desk:
    """Made for each session. `sandbox` are AsyncSandbox's arguments: the operator's choice, which no tool can weaken."""

    def __init__(self, sandbox: Mapping[str, Any]) -> None:
        self._sandbox = dict(sandbox)
        self._boxes: dict[str, AsyncSandbox] = {}
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
        outcomes = await asyncio.gather(*(box.close() for box in boxes), return_exceptions=True)
        for failure in (o for o in outcomes if isinstance(o, BaseException)):
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

    async def _open(self, arguments: Mapping[str, Any]) -> str:
        if self._closed or len(self._boxes) >= MAX_SANDBOXES:
            raise CapacityExceeded(
                f"this session holds {len(self._boxes)} sandboxes",
                cause="the session is ending" if self._closed else f"a session may have {MAX_SANDBOXES}",
                remediation="end one with kill_sandbox",
            )
        box = await AsyncSandbox(**arguments).open()
        self._boxes[box.id] = box
        return box.id

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
