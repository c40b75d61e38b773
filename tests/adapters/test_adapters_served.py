"""Each adapter with `url` and `api_key`: its sandboxes are a real server's, and are gone from there once it is done."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_langchain
import test_openai_agents
import test_smolagents
from agents import Runner

from fumehood.adapters.langchain import PythonSandboxTool
from fumehood.adapters.openai_agents import FumehoodSandboxClient
from fumehood.adapters.smolagents import FumehoodExecutor
from fumehood.client.sandbox import AsyncSandbox, Sandbox
from http_server import Serving, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("served")) as started:
        yield started


async def test_langchains_tool(server: Serving) -> None:
    with PythonSandboxTool(**server.where) as tool:
        await tool.ainvoke(test_langchain.call("x = 41"))
        assert test_langchain.text(tool.invoke(test_langchain.call("x + 1"))) == "42"  # blocking, where a loop runs
        assert [box.id for box in await AsyncSandbox.list(**server.where)] == [tool._box.id]
    assert await AsyncSandbox.list(**server.where) == []


def test_smolagents_executor(server: Serving) -> None:
    executor = FumehoodExecutor(**server.where)
    model = test_smolagents.Script("x = 41", "final_answer([x + 1])")
    assert test_smolagents.agent_of(executor, model).run("add") == [42]
    assert len(Sandbox.list(**server.where)) == 1
    executor.cleanup()
    assert Sandbox.list(**server.where) == []


async def test_openais_sandbox_agent_with_its_terminal(server: Serving) -> None:
    def answer(model: test_openai_agents.Script) -> object:
        number = int(model.outputs()[-1].split("session ID ")[1].split()[0])
        return test_openai_agents.calls("write_stdin", session_id=number, chars="40 + 2\nexit()\n", yield_time_ms=3000)

    start = test_openai_agents.calls("exec_command", cmd="python3 -q", tty=True, yield_time_ms=600)
    model = test_openai_agents.Script(start, answer, test_openai_agents.says("done"))
    client = FumehoodSandboxClient(**server.where)
    await Runner.run(test_openai_agents.coder(model), "work", run_config=test_openai_agents.config(client))
    assert "42" in model.outputs()[-1] and "exited with code 0" in model.outputs()[-1]
    assert await AsyncSandbox.list(**server.where) == []
