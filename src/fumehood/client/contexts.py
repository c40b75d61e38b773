"""Code contexts: interpreters that keep their state between runs, several in one sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fumehood.client.calls import await_engine, block_on
from fumehood.client.port import Link

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox, Sandbox


@dataclass(frozen=True, slots=True)
class Context:
    """`language` is python, bash or javascript (where node is in the image)."""

    id: str
    language: str
    cwd: str


def _context(raw: dict[str, Any]) -> Context:
    return Context(str(raw.get("id")), str(raw.get("language")), str(raw.get("cwd")))


def _create(language: str, cwd: str | None) -> dict[str, Any]:
    return {"language": language} | ({"cwd": cwd} if cwd else {})


class AsyncContexts:
    """Raises NotFound for an unknown id, InvalidInput for a language that the image lacks."""

    def __init__(self, box: AsyncSandbox) -> None:
        self._engine, self._box = box.engine, box

    @property
    def _link(self) -> Link:
        return self._box.port.link  # asked for anew: a rollback of the whole sandbox gives it another

    async def create(self, language: str = "python", cwd: str | None = None) -> Context:
        return _context(await self._call("context.create", **_create(language, cwd)))

    async def list(self) -> list[Context]:
        return [_context(c) for c in (await self._call("context.list"))["contexts"]]

    async def restart(self, context: str) -> None:
        """A fresh interpreter under the same id."""
        await self._call("context.restart", id=context)

    async def remove(self, context: str) -> None:
        await self._call("context.remove", id=context)

    async def interrupt(self, context: str) -> None:
        await self._call("context.interrupt", id=context)

    async def _call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        return await await_engine(self._engine, self._link.call(verb, **arguments))


class Contexts:
    """AsyncContexts, blocking."""

    def __init__(self, box: Sandbox) -> None:
        self._engine, self._box = box.engine, box

    @property
    def _link(self) -> Link:
        return self._box.port.link  # asked for anew: a rollback of the whole sandbox gives it another

    def create(self, language: str = "python", cwd: str | None = None) -> Context:
        return _context(self._call("context.create", **_create(language, cwd)))

    def list(self) -> list[Context]:
        return [_context(c) for c in self._call("context.list")["contexts"]]

    def restart(self, context: str) -> None:
        self._call("context.restart", id=context)

    def remove(self, context: str) -> None:
        self._call("context.remove", id=context)

    def interrupt(self, context: str) -> None:
        self._call("context.interrupt", id=context)

    def _call(self, verb: str, **arguments: Any) -> dict[str, Any]:
        return block_on(self._engine, self._link.call(verb, **arguments))
