"""`fumehood pool` and `templates`: what a server keeps warm, and what sandboxes can be made from."""

from __future__ import annotations

from typing import Any

from fumehood.cli import exits, reach, show
from fumehood.cli.reach import JsonOption, KeyOption, UrlOption

COLUMNS = ("class", "warm", "target", "hits", "misses", "breaker")


def pool(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """Show the warm pool, class by class (needs an admin key)."""

    async def work() -> int:
        async with reach.admin(url, api_key) as admin:
            found = (await admin.get("/v1/status"))["pools"]
        if as_json:
            exits.print_json({"pools": found})
        else:
            show.table(COLUMNS, rows(found))
        return 0

    exits.drive(work(), as_json=as_json)


def rows(pools: list[dict[str, Any]]) -> list[list[object]]:
    return [[pool.get(name, "") for name in COLUMNS] for pool in pools]


def templates(as_json: JsonOption = False, url: UrlOption = None, api_key: KeyOption = None) -> None:
    """List what sandboxes can be made from."""

    async def work() -> int:
        async with reach.admin(url, api_key) as admin:
            found = (await admin.get("/v1/templates"))["templates"]
        if as_json:
            exits.print_json({"templates": found})
        else:
            show.table(("name", "preloads"), [(t["name"], " ".join(t.get("preload") or ())) for t in found])
        return 0

    exits.drive(work(), as_json=as_json)
