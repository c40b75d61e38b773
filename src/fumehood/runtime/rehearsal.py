"""A cell all the way, before somebody waits for one: the pages that a first cell touches are there then, and its own."""

from __future__ import annotations

from fumehood.errors import SetupFailed
from fumehood.runtime.link import Link

_CODE = "print(6)\n6 * 7"


async def rehearse(link: Link, *, fully: bool = False) -> None:
    """It leaves no trace. `fully`: with each library that is loaded. Raises what Link.call raises, and SetupFailed."""
    end = await link.call("context.run", code=_CODE, language="python", env={})
    if end.get("outcome") != "ok":
        raise SetupFailed("a new sandbox could not run a cell", cause=f"it came to {end.get('outcome')!r:.40}")
    await link.call("context.warm", language="python", fully=fully)
