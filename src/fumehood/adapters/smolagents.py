"""smolagents: a CodeAgent whose code runs in a fumehood sandbox.

    agent = CodeAgent(tools=[], model=model, executor=FumehoodExecutor(policy="data-analysis"))

Values cross as JSON and nothing else, never as pickle: unpickling what a guest sent would run its code here (H16). So a final
answer is text, numbers, None, lists and dicts with text keys, and numpy values (as numbers and lists); anything else raises
TypeError inside, which the model reads and mends. Variables cross the other way by the same rule. Tools cross as source and
run inside, without network; managed agents can't cross.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smolagents.default_tools import FinalAnswerTool
from smolagents.local_python_executor import CodeOutput, InterpreterError, PythonExecutor
from smolagents.tools import Tool, get_tools_definition_code

from fumehood.client import told
from fumehood.client.sandbox import Sandbox
from fumehood.errors import InvalidInput, SandboxGone
from fumehood.model import Result

_ANSWER = "application/vnd.fumehood.final-answer+json"
# BaseException: a model's own `except Exception` around final_answer() must not keep the agent going.
_PRELUDE = f'''
class FinalAnswer(BaseException):
    pass

def final_answer(answer=None):
    import json
    def plain(value):
        if hasattr(value, "tolist"):
            return value.tolist()
        kind = type(value).__name__
        raise TypeError(f"final_answer takes JSON data (text, numbers, lists, dicts), not {{kind}}; convert it first")
    text = json.dumps(answer, default=plain)
    class Carried:
        def _repr_mimebundle_(self, include=None, exclude=None):
            return {{"{_ANSWER}": text, "text/plain": "final answer"}}
    display(Carried())
    raise FinalAnswer()
'''


class FumehoodExecutor(PythonExecutor):
    """`sandbox` are Sandbox's arguments. The sandbox is made on first use and ended by cleanup(), which the agent calls."""

    def __init__(self, *, timeout_s: float | None = None, **sandbox: Any) -> None:
        self._sandbox, self._timeout_s = sandbox, timeout_s
        self._box: Sandbox | None = None
        self._sent: dict[str, str] = {"": _PRELUDE}  # what a new sandbox has to be told, by name

    def send_tools(self, tools: dict[str, Tool]) -> None:
        """Raises InvalidInput for what can't run inside: a managed agent, a final_answer of one's own, a missing module."""
        for name, tool in tools.items():
            if isinstance(tool, FinalAnswerTool) and type(tool) is FinalAnswerTool:
                continue
            self._send(f"tool {name}", _source(name, tool))

    def send_variables(self, variables: dict[str, Any]) -> None:
        """Raises InvalidInput that names the variable which is no JSON data."""
        for name, value in variables.items():
            self._send(f"variable {name}", _assignment(name, value))

    def __call__(self, code_action: str) -> CodeOutput:
        """Raises InterpreterError with output, traceback and cause when the code failed; the agent shows it to the model."""
        result = self._run(code_action)
        if result.error is not None and result.error.name == "FinalAnswer":
            return CodeOutput(output=_answer(result), logs=told.clip(result.stdout), is_final_answer=True)
        if not result.ok:
            raise InterpreterError(told.story(result))
        shown = [f"[{part[1]} shown]" if part[0] == "image" else part[1] for part in told.rich_parts(result)]
        logs = "".join((told.clip(result.stdout), told.clip(result.stderr)))
        return CodeOutput(output="\n".join(shown) or None, logs=logs, is_final_answer=False)

    def cleanup(self) -> None:
        """End the sandbox. A later call makes a new one."""
        box, self._box = self._box, None
        if box is not None:
            box.close()

    def _send(self, what: str, code: str) -> None:
        known = self._sent.get(what)
        self._sent[what] = code
        if self._box is not None and known != code:
            _must(self._run(code), what)

    def _run(self, code: str) -> Result:
        try:
            return self._open().run(code, timeout_s=self._timeout_s)
        except SandboxGone as gone:
            self.cleanup()
            raise InterpreterError(f"{gone}. Its variables and files are lost; the next call gets a new sandbox.") from gone

    def _open(self) -> Sandbox:
        if self._box is None:
            box = Sandbox(**self._sandbox).open()
            try:
                for what, code in self._sent.items():
                    _must(box.run(code), what)
            except BaseException:
                box.close()
                raise
            self._box = box
        return self._box


def _source(name: str, tool: Tool) -> str:
    if not isinstance(tool, Tool) or isinstance(tool, FinalAnswerTool):  # pyright: ignore[reportUnnecessaryIsInstance] # agents come here too
        raise InvalidInput(
            f"{name} can't cross into a sandbox",
            cause="only tools with source of their own run inside; an agent or another final_answer lives out here",
            remediation="leave it out, or run the agent with another executor",
        )
    return get_tools_definition_code({name: tool})


def _assignment(name: str, value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError) as error:
        raise InvalidInput(
            f"variable {name} can't cross into a sandbox",
            cause=str(error),
            remediation="pass JSON data, or write a file inside",
        ) from None
    return f"import json as _json\nglobals()[{name!r}] = _json.loads({text!r})"


def _must(result: Result, what: str) -> None:
    if not result.ok:
        cause = told.story(result)
        raise InvalidInput(
            f"{what or 'the prelude'} does not work inside", cause=cause, remediation="use a template that has what it needs"
        )


def _answer(result: Result) -> Any:
    """The guest chose every byte of it: read as JSON, so the worst it can be is a wrong answer."""
    carried: list[Mapping[str, Any]] = [rich.data for rich in result.results if _ANSWER in rich.data]
    try:
        return json.loads(str(carried[-1][_ANSWER]))
    except (IndexError, ValueError, RecursionError) as error:
        raise InterpreterError(f"final_answer did not carry JSON data: {error}; is it too large?") from None
