"""The real tool class of LangChain, called as an agent calls it: by the tool calls of a (scripted) chat model."""

from __future__ import annotations

import asyncio
import base64

import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

from fumehood.adapters.langchain import PythonSandboxTool
from fumehood.model import Result


@pytest.fixture
def tool():
    with PythonSandboxTool() as tool:
        yield tool


def call(code: str, number: int = 1, **arguments: object) -> dict:
    return {"name": "run_python", "args": {"code": code, **arguments}, "id": f"call_{number}", "type": "tool_call"}


def text(message: ToolMessage) -> str:
    return message.content if isinstance(message.content, str) else "\n".join(b.get("text", "") for b in message.content)


class Script(GenericFakeChatModel):
    def bind_tools(self, tools, **kwargs):
        return self


def test_the_schema_that_a_model_gets_describes_each_argument(tool):
    schema = tool.tool_call_schema.model_json_schema()
    assert set(schema["properties"]) == {"code", "timeout_s"} and schema["required"] == ["code"]
    assert all(p["description"] for p in schema["properties"].values()) and "without network" in tool.description


def test_a_scripted_models_tool_calls_run_with_state_and_end_in_its_answer(tool):
    turns = [AIMessage("", tool_calls=[call("x = 41", 1)]), AIMessage("", tool_calls=[call("x + 1", 2)]), AIMessage("it is 42")]
    model, messages = Script(messages=iter(turns)).bind_tools([tool]), [HumanMessage("compute")]
    while True:
        answer = model.invoke(messages)
        messages.append(answer)
        if not answer.tool_calls:
            break
        messages += [tool.invoke(c) for c in answer.tool_calls]
    results = [m for m in messages if isinstance(m, ToolMessage)]
    assert [text(m) for m in results] == ["(no output)", "42"] and messages[-1].content == "it is 42"
    assert isinstance(results[1].artifact, Result) and results[1].artifact.ok and results[1].tool_call_id == "call_2"


async def test_async_and_blocking_calls_share_one_sandbox_even_inside_a_running_loop(tool):
    await tool.ainvoke(call("x = 1"))
    assert text(tool.invoke(call("x"))) == "1"  # blocking, where a loop runs: as in a notebook
    several = await asyncio.gather(*(tool.ainvoke(call(f"{n} * 2", n)) for n in range(4)))
    assert [text(m) for m in several] == ["0", "2", "4", "6"]


@pytest.mark.data
def test_a_chart_is_an_image_block():
    with PythonSandboxTool(policy="data-analysis") as tool:
        message = tool.invoke(call("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"))
    images = [b for b in message.content if b["type"] == "image"]
    assert len(images) == 1 and base64.b64decode(images[0]["base64"]).startswith(b"\x89PNG")
    assert [b["type"] for b in message.content_blocks if b["type"] == "image"] == ["image"]


def test_a_failing_program_is_told_with_status_cause_and_traceback(tool):
    failed = tool.invoke(call("print('before'); 1 / 0"))
    late = tool.invoke(call("while True: pass", timeout_s=0.3))
    assert "before" in text(failed) and "ZeroDivisionError" in text(failed) and failed.artifact.status == "error"
    assert "status: timeout" in text(late) and late.artifact.status == "timeout"


def test_a_sandbox_that_ended_is_an_error_message_and_no_crash(tool):
    tool.close()
    message = tool.invoke(call("1"))
    assert message.status == "error" and "invalid_transition" in text(message)


def test_wrong_arguments_are_refused_before_anything_runs(tool):
    with pytest.raises(ValueError, match="timeout_s"):
        tool.invoke(call("1", timeout_s=-1))


async def test_cancelling_the_call_stops_the_program(tool):
    running = asyncio.ensure_future(tool.ainvoke(call("import time; open('began', 'w'); time.sleep(60)")))
    async with asyncio.timeout(10):
        while not await tool._box.files.exists("began"):  # noqa: ASYNC110 # a file of the guest
            await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert text(await tool.ainvoke(call("'free again'"))) == "'free again'"
