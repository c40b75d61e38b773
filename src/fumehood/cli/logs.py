"""`fumehood logs`: what ran in a sandbox and what it printed, from the server's records; ended sandboxes too."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fumehood.cli import exits, reach, show
from fumehood.cli.reach import KeyOption, UrlOption
from fumehood.errors import NotFound

if TYPE_CHECKING:
    from fumehood.client.admin import Admin


def logs(
    sandbox_id: Annotated[str, typer.Argument(metavar="ID", help="The sandbox.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until it ends.")] = False,
    last: Annotated[int, typer.Option("--last", "-n", help="Executions, from the newest.", min=0, max=10_000)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line and nothing else.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Show a sandbox's executions with their outputs, oldest first."""

    async def work() -> int:
        from fumehood.client.admin import piece

        async with reach.admin(url, api_key) as admin:
            log = Log(admin, sandbox_id, as_json)
            await admin.get(f"/v1/sandboxes/{piece(sandbox_id)}")
            if not follow:
                await log.catch_up(last)
                return 0
            async with admin.listening() as events:
                await log.follow(events, last)
        return 0

    exits.drive(work(), as_json=as_json)


class Log:
    """Prints each execution once, when it is done."""

    def __init__(self, admin: Admin, sandbox_id: str, as_json: bool) -> None:
        self._admin, self._id, self._as_json = admin, sandbox_id, as_json
        self._shown: set[str] = set()

    async def catch_up(self, last: int) -> None:
        newest = await self._admin.pages("/v1/executions", "executions", last, sandbox_id=self._id)
        for record in reversed(newest):
            if record["state"] == "done" and record["id"] not in self._shown:
                self._shown.add(record["id"])
                self._execution(await self._admin.get(f"/v1/executions/{record['id']}"))

    async def follow(self, events: AsyncIterator[dict[str, Any]], last: int) -> None:
        # Records are the truth and events only say when to look: one that was missed costs a moment, no line.
        await self.catch_up(last)
        if await self._ended():
            return
        async for event in events:
            if event.get("sandbox_id") != self._id:
                continue
            self._event(event)
            await self.catch_up(50)
            if await self._ended():
                return

    async def _ended(self) -> bool:
        from fumehood.client.admin import piece

        try:
            return (await self._admin.get(f"/v1/sandboxes/{piece(self._id)}"))["state"] == "stopped"
        except NotFound:
            return True

    def _execution(self, record: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps({"execution": record}), flush=True)
            return
        result: dict[str, Any] = record.get("result") or {}
        took = (record["finished_at"] or 0) - (record["started_at"] or record["finished_at"] or 0)
        head = f"--- {record['id']} {show.clock(record['queued_at'])} {record['kind']}: {record['status']} in {took:.2f} s"
        print(show.word(f"{head}{', ' + record['cause'] if record.get('cause') else ''}"), flush=True)
        for text in _texts(result):
            show.write(sys.stdout, text if text.endswith("\n") else text + "\n")

    def _event(self, event: dict[str, Any]) -> None:
        if self._as_json:
            print(json.dumps({"event": event}), flush=True)
        else:
            facts = json.dumps(event.get("data") or {})
            print(show.word(f"*** {show.clock(event.get('at'))} {event.get('kind')} {facts}"), flush=True)


def _texts(result: dict[str, Any]) -> list[str]:
    main = [r["data"].get("text/plain") for r in result.get("results", ()) if r.get("is_main_result")]
    error: dict[str, Any] = result.get("error") or {}
    return [text for text in (result.get("stdout"), result.get("stderr"), *main, error.get("traceback")) if text]
