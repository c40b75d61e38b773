"""LangChain: a tool that runs Python in a fumehood sandbox, with state between calls.

    with PythonSandboxTool(policy="data-analysis") as tool:
        agent = create_agent(model, [tool])

The model sees output, errors and charts; the ToolMessage's artifact is the whole Result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Self, TypeVar

from langchain_core.tools import BaseTool, ToolException
from langchain_core.tools.base import ArgsSchema
from pydantic import BaseModel, Field, PrivateAttr

from fumehood.client import told
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import FumehoodError
from fumehood.model import Result

T = TypeVar("T")
_Answer = tuple[list[dict[str, Any]], Result]


class RunPython(BaseModel):
    """What the model may set."""

    code: str = Field(description="Python code. Its last expression, output and charts come back.", max_length=1 << 20)
    timeout_s: float | None = Field(default=None, gt=0, description="Seconds until it is stopped.")


class PythonSandboxTool(BaseTool):
    """`sandbox` are AsyncSandbox's arguments. It is opened on construction; close() or `with` ends it."""

    name: str = "run_python"
    description: str = (
        "Run Python code in an isolated sandbox without network. Variables, imports and files stay for the next call."
    )
    args_schema: ArgsSchema | None = RunPython
    response_format: Literal["content", "content_and_artifact"] = "content_and_artifact"
    handle_tool_error: Any = True  # a sandbox that ended is told to the model; it is no crash of the agent
    _box: AsyncSandbox = PrivateAttr()

    def __init__(self, **sandbox: Any) -> None:
        super().__init__()
        self._box = _now(AsyncSandbox(**sandbox).open())

    def close(self) -> None:
        """End the sandbox. Idempotent."""
        _now(self._box.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, code: str, timeout_s: float | None = None) -> _Answer:
        return _now(self._arun(code, timeout_s))

    async def _arun(self, code: str, timeout_s: float | None = None) -> _Answer:
        try:
            result = await self._box.run(code, timeout_s=timeout_s)
        except FumehoodError as error:
            raise ToolException(f"{error.code}: {error}. {error.remediation}") from error
        return [_block(part) for part in told.parts(result)], result


def _block(part: told.Part) -> dict[str, Any]:
    if part[0] == "text":
        return {"type": "text", "text": part[1]}
    return {"type": "image", "mime_type": part[1], "base64": part[2]}


def _now(work: Coroutine[Any, Any, T]) -> T:
    """Also where a loop already runs in this thread, as in a notebook: then beside it. The sandbox itself lives in neither."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(asyncio.run, work).result()
