"""A sandbox behind a server: the Port that speaks docs/http.md, and the two ways to get one."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from fumehood.client import answers
from fumehood.client.address import Address
from fumehood.client.engine import Engine
from fumehood.client.port import Link, Port
from fumehood.client.remote_link import RemoteLink
from fumehood.client.server import ALIVE_S, Server, piece, shared
from fumehood.client.snapshots import Snapshot, is_checkpoint
from fumehood.client.sse import events
from fumehood.errors import NotFound, SandboxGone
from fumehood.execution import Sinks
from fumehood.model import CodeRequest, ExecRequest, Protection, Result, RichResult, check_id
from fumehood.records import SandboxRecord
from fumehood.runtime.base import Stats

_DAY_S = 86_400.0  # the longest timeout_s that there is
# Beside the run's own time: the queue, a cold start, the network. The server keeps the deadline (H17); this only notices
# a server that no longer does.
_MARGIN_S = 120.0
_STATS, _PROTECTIONS, _RECORD = TypeAdapter(Stats), TypeAdapter(tuple[Protection, ...]), TypeAdapter(SandboxRecord)
_FORKS, _SNAPSHOT = TypeAdapter(tuple[SandboxRecord, ...]), TypeAdapter(Snapshot)


@dataclass(frozen=True, slots=True)
class Create:
    """Opens a new sandbox on the server. `body` is that of POST /v1/sandboxes."""

    address: Address
    body: Mapping[str, Any]

    async def open(self, engine: Engine) -> Port:
        server = shared(engine, self.address)
        made = await server.json("POST", "/v1/sandboxes", body=self.body, once=True, answer_s=_MARGIN_S)
        return await _remote(server, made, is_mine=True)


@dataclass(frozen=True, slots=True)
class Join:
    """Joins a sandbox that lives there."""

    address: Address
    sandbox_id: str

    async def open(self, engine: Engine) -> Port:
        server = shared(engine, self.address)
        return await _remote(server, await server.json("GET", f"/v1/sandboxes/{self.sandbox_id}"), is_mine=False)


async def _remote(server: Server, shown: dict[str, Any], *, is_mine: bool) -> Remote:
    record = answers.typed(server.url, _RECORD, shown)
    check_id(record.id, "sandbox id from the server")
    if "protections" not in shown:
        shown = await server.json("GET", f"/v1/sandboxes/{record.id}")
    protections = answers.typed(server.url, _PROTECTIONS, shown.get("protections"))
    return Remote(RemoteLink(server, record.id), record, protections, is_mine=is_mine)


async def sandboxes(engine: Engine, address: Address, state: str | None, limit: int) -> list[SandboxRecord]:
    server = shared(engine, address)
    shown = await server.pages("/v1/sandboxes", "sandboxes", limit, {"state": state})
    return [answers.typed(server.url, _RECORD, record) for record in shown]


async def snapshots(engine: Engine, address: Address, sandbox_id: str | None, limit: int) -> list[Snapshot]:
    server = shared(engine, address)
    shown = await server.pages("/v1/snapshots", "snapshots", limit, {"sandbox_id": sandbox_id})
    return [answers.typed(server.url, _SNAPSHOT, snapshot) for snapshot in shown]


async def discard(engine: Engine, address: Address, snapshot_id: str) -> None:
    await shared(engine, address).ask("DELETE", f"/v1/snapshots/{piece(snapshot_id)}", answer_s=_MARGIN_S)


class Remote:
    def __init__(self, link: RemoteLink, record: SandboxRecord, protections: Sequence[Protection], *, is_mine: bool) -> None:
        self._link, self._record, self.protections, self._is_mine = link, record, protections, is_mine

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def link(self) -> Link:
        return self._link

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._record.metadata

    @property
    def policy(self) -> str:
        return self._record.policy

    @property
    def tier(self) -> str:
        return self._record.tier

    async def run(self, request: CodeRequest, sinks: Sinks) -> Result:
        body = {"code": request.code, "language": request.language, "context": request.context}
        return await self._execute("/executions", body, request, sinks)

    async def exec(self, request: ExecRequest, sinks: Sinks) -> Result:
        stdin = None if request.stdin is None else base64.b64encode(request.stdin).decode()
        body = {"argv": list(request.argv), "cwd": request.cwd, "stdin_base64": stdin}
        return await self._execute("/exec", body, request, sinks)

    async def _execute(self, path: str, body: dict[str, Any], request: CodeRequest | ExecRequest, sinks: Sinks) -> Result:
        self._link.check()
        server, path = self._link.server, self._link.base + path
        given = {**body, "timeout_s": request.timeout_s, "env": dict(request.env) or None}
        body = {name: value for name, value in given.items() if value is not None}
        if sinks.output is not None or sinks.result is not None:
            return await _followed(server, path, body, sinks)
        answer_s = (request.timeout_s or _DAY_S) + _MARGIN_S
        limit_bytes = answers.MAX_RESULT_BYTES
        data = await server.ask("POST", path, body=body, once=True, answer_s=answer_s, limit_bytes=limit_bytes)
        return answers.result_of(server.url, data)

    async def checkpoint(self, context: str | None) -> str:
        body = {"context": context} if context else {}
        return str((await self._link.ask("POST", "/checkpoints", body=body, answer_s=_MARGIN_S)).get("checkpoint"))

    async def snapshot(self, metadata: Mapping[str, str]) -> Snapshot:
        body = {"metadata": dict(metadata)} if metadata else {}
        made = await self._link.ask("POST", "/snapshots", body=body, once=True, answer_s=_MARGIN_S)
        return answers.typed(self._link.server.url, _SNAPSHOT, made)

    async def fork(self, count: int) -> list[Port]:
        """What is enforced for the first one is enforced for its forks: they are of the same tier and policy."""
        server = self._link.server
        made = await self._link.ask("POST", "/fork", body={"count": count}, once=True, answer_s=_MARGIN_S)
        records = answers.typed(server.url, _FORKS, made.get("sandboxes"))
        if len(records) != count:
            raise answers.not_ours(server.url, f"asked for {count} forks, it names {len(records)}")
        links = [RemoteLink(server, check_id(record.id, "sandbox id from the server")) for record in records]
        return [Remote(link, record, self.protections, is_mine=True) for link, record in zip(links, records, strict=True)]

    async def rollback(self, name: str) -> None:
        body = {"checkpoint" if is_checkpoint(name) else "snapshot": name}
        await self._link.ask("POST", "/rollback", body=body, once=True, answer_s=_MARGIN_S)

    async def pause(self) -> None:
        await self._link.ask("POST", "/pause")

    async def resume(self) -> None:
        await self._link.ask("POST", "/resume")

    async def stats(self) -> Stats:
        return answers.typed(self._link.server.url, _STATS, await self._link.ask("GET", "/stats"))

    async def extend(self, seconds: float) -> None:
        await self._link.ask("PATCH", "", body={"lease_s": seconds})

    async def kill(self) -> None:
        if not self._link.gone:
            with contextlib.suppress(NotFound, SandboxGone):  # it had ended by itself: that is what was asked for
                await self._link.ask("DELETE", "")
            self._link.gone = "killed by its owner"

    async def close(self) -> None:
        """One that was joined lives on: its lease is another's."""
        await self._link.aclose()
        if self._is_mine:
            await self.kill()


async def _followed(server: Server, path: str, body: dict[str, Any], sinks: Sinks) -> Result:
    opened = server.stream("POST", path, body=body, once=True, accept=b"text/event-stream", answer_s=ALIVE_S)
    async with opened as chunks:
        async for kind, data in events(server.url, chunks, answers.MAX_RESULT_BYTES):
            match kind:
                case "stdout" | "stderr" if sinks.output is not None:
                    sinks.output(kind, str(data.get("text", "")))
                case "result" if sinks.result is not None and isinstance(data.get("data"), dict):
                    sinks.result(RichResult(data["data"], data.get("is_main_result") is True))
                case "problem":
                    raise answers.problem_from(server.url, data)
                case "end":
                    return answers.result_from(server.url, data.get("result"))
                case _:
                    pass  # started, and whatever a newer server says beside
    raise answers.unreachable(server.url, "it ended the stream before the run's end")
