"""A real CodeAgent over a real sandbox; only the model is a script."""

from __future__ import annotations

import pytest
from smolagents import CodeAgent, Tool, tool
from smolagents.models import ChatMessage, MessageRole, Model

from fumehood.adapters.smolagents import FumehoodExecutor
from fumehood.errors import InvalidInput


class Script(Model):
    """Answers with one code block after the other and keeps what it was shown."""

    def __init__(self, *blocks: str) -> None:
        super().__init__()
        self.blocks, self.seen = list(blocks), []

    def generate(self, messages, **kwargs) -> ChatMessage:
        self.seen.append(str([m.content for m in messages]))
        return ChatMessage(role=MessageRole.ASSISTANT, content=f"Thought: next.\n<code>\n{self.blocks.pop(0)}\n</code>")


@pytest.fixture
def executor():
    executor = FumehoodExecutor()
    yield executor
    executor.cleanup()


def agent_of(executor, model, tools=()) -> CodeAgent:
    return CodeAgent(tools=list(tools), model=model, executor=executor, verbosity_level=0, max_steps=6)


def test_state_stays_over_the_steps_and_the_final_answer_is_data(executor):
    model = Script("x = 20\nprint('step one')", "y = x + 1", "final_answer({'sum': y, 'list': [1, 2.5, None, 'a']})")
    assert agent_of(executor, model).run("add") == {"sum": 21, "list": [1, 2.5, None, "a"]}
    assert "step one" in model.seen[1]


def test_an_error_is_fed_back_with_its_traceback_and_output_and_the_agent_goes_on(executor):
    model = Script("print('before')\n1 / 0", "final_answer('mended')")
    assert agent_of(executor, model).run("divide") == "mended"
    assert "ZeroDivisionError" in model.seen[1] and "before" in model.seen[1]


def test_the_code_runs_in_the_sandbox_and_not_here(executor, tmp_path):
    (tmp_path / "secret").write_text("of the host")
    model = Script(f"print(open({str(tmp_path / 'secret')!r}).read())", "import os\nfinal_answer(os.getcwd())")
    assert agent_of(executor, model).run("peek") == "/home/user"
    assert "FileNotFoundError" in model.seen[1] or "PermissionError" in model.seen[1]


def test_variables_cross_as_data(executor):
    model = Script("final_answer(rows[1]['name'] + quote)")
    given = {"rows": [{"name": "a"}, {"name": "ü"}], "quote": "'''\"\\"}
    assert agent_of(executor, model).run("pick", additional_args=given) == "ü'''\"\\"


def test_a_variable_that_is_no_data_is_refused_by_name(executor):
    with pytest.raises(InvalidInput, match="variable handle"):
        executor.send_variables({"handle": object()})


def test_tools_cross_as_source_and_run_inside(executor):
    @tool
    def shout(text: str) -> str:
        """Make it loud.

        Args:
            text: What to shout.
        """
        return text.upper()

    class Twice(Tool):
        name, description, output_type = "twice", "Doubles.", "integer"
        inputs = {"number": {"type": "integer", "description": "n"}}  # noqa: RUF012 # so the framework wants it

        def forward(self, number: int) -> int:
            return 2 * number

    model = Script("final_answer(shout('a') + str(twice(21)))")
    assert agent_of(executor, model, [shout, Twice()]).run("use them") == "A42"


def test_what_cannot_cross_as_a_tool_is_refused(executor):
    with pytest.raises(InvalidInput, match="helper can't cross"):
        executor.send_tools({"helper": agent_of(FumehoodExecutor(), Script())})


def test_an_answer_that_is_no_data_is_refused_inside_so_that_the_model_can_mend_it(executor):
    model = Script("final_answer(object())", "final_answer({1, 2})", "final_answer(sorted({2, 1}))")
    assert agent_of(executor, model).run("answer") == [1, 2]
    assert "final_answer takes JSON data" in model.seen[1] and "not set" in model.seen[2]


@pytest.mark.data
def test_numpy_values_become_numbers_and_lists():
    executor = FumehoodExecutor(policy="data-analysis")
    try:
        model = Script("import numpy as np\nfinal_answer({'a': np.arange(3), 'n': np.float64(0.5)})")
        assert agent_of(executor, model).run("count") == {"a": [0, 1, 2], "n": 0.5}
    finally:
        executor.cleanup()


def test_bytes_of_a_guest_are_never_unpickled_h16(executor, tmp_path):
    """A guest that speaks the framework's own pickle format, and one that carries a forged answer: both are only text."""
    touched = tmp_path / "touched"
    forged = f"""
import pickle, base64, io
class Evil:
    def __reduce__(self):
        return (io.open, ({str(touched)!r}, "w"))
payload = "pickle:" + base64.b64encode(pickle.dumps(Evil())).decode()
"""
    model = Script(
        forged + "raise type('FinalAnswerException', (Exception,), {})(payload)",
        "class C:\n    def _repr_mimebundle_(self, include=None, exclude=None):\n"
        "        return {'application/vnd.fumehood.final-answer+json': payload, 'text/plain': ''}\n"
        "display(C())\nraise FinalAnswer()",
        "final_answer(payload)",
    )
    answer = agent_of(executor, model).run("attack")
    assert answer.startswith("pickle:") and not touched.exists()
    assert "did not carry JSON data" in model.seen[2]


def test_an_except_clause_of_the_model_does_not_swallow_the_answer(executor):
    model = Script("try:\n    final_answer(1)\nexcept Exception:\n    print('swallowed')")
    assert agent_of(executor, model).run("try") == 1


def test_a_hostile_or_endless_step_is_told_as_what_it_was(executor):
    executor = FumehoodExecutor(timeout_s=0.5)
    model = Script("while True: pass", "final_answer('over')")
    try:
        assert agent_of(executor, model).run("spin") == "over"
    finally:
        executor.cleanup()
    assert "status: timeout" in model.seen[1]


def test_a_sandbox_that_ended_is_told_and_replaced_with_the_tools_in_it(executor):
    executor.send_variables({"kept": 5})
    executor("x = 1")
    executor._box.kill()
    with pytest.raises(ValueError, match="next call gets a new sandbox"):
        executor("x")
    assert executor("kept, 'x' in globals()").output == "(5, False)"


def test_cleanup_ends_the_sandbox():
    executor = FumehoodExecutor()
    executor("1")
    box = executor._box
    supervisor, sandbox_id = box.engine.supervisor, box.id
    agent_of(executor, Script()).cleanup()
    with pytest.raises(Exception, match=sandbox_id):
        supervisor.get(sandbox_id)
