"""A cell all the way, before somebody waits for one: the pages that a first cell touches are there then, and its own."""

from __future__ import annotations

from fumehood.runtime.link import Link

_CODE = "print(6)\n6 * 7"


async def rehearse(link: Link, *, fully: bool = False) -> None:
    """It leaves no trace. `fully`: with each library that is loaded. Raises what Link.call raises."""
    await link.call("context.run", code=_CODE, language="python", env={})
    await link.call("context.warm", language="python", fully=fully)
