"""The real Runner, its real sandbox agents and tools, over a real sandbox; only the model is a script."""

from __future__ import annotations

import asyncio
import json
import uuid

import pytest
from agents import Agent, RunConfig, Runner, Usage
from agents.items import ModelResponse
from agents.models.interface import Model
from agents.run_config import SandboxRunConfig
from agents.sandbox import Manifest, SandboxAgent
from agents.sandbox.capabilities import Filesystem, Shell
from agents.sandbox.entries import File
from agents.sandbox.errors import ExecTimeoutError, WorkspaceReadNotFoundError
from agents.sandbox.snapshot import LocalSnapshotSpec
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from fumehood.adapters.openai_agents import WORKSPACE, FumehoodOptions, FumehoodSandboxClient, run_python
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import NotFound, Unsupported

RAN_AS_ROOT_MARK = "of the host"


def says(text: str) -> ResponseOutputMessage:
    part = ResponseOutputText(text=text, type="output_text", annotations=[])
    return ResponseOutputMessage(id=uuid.uuid4().hex, type="message", role="assistant", status="completed", content=[part])


def calls(name: str, **arguments: object) -> ResponseFunctionToolCall:
    identity = uuid.uuid4().hex
    return ResponseFunctionToolCall(
        id=identity, call_id=identity, type="function_call", name=name, arguments=json.dumps(arguments)
    )


class Script(Model):
    """Does one scripted turn after the other and keeps what it was shown."""

    def __init__(self, *turns) -> None:
        self.turns, self.shown, self.tools = list(turns), [], []

    async def get_response(self, system_instructions, input, model_settings, tools, *rest, **options) -> ModelResponse:
        self.shown.append(input if isinstance(input, str) else list(input))
        self.tools = [tool.name for tool in tools]
        turn = self.turns.pop(0)
        return ModelResponse(output=[turn(self) if callable(turn) else turn], usage=Usage(), response_id=None)

    def stream_response(self, *args, **options):
        raise NotImplementedError

    def outputs(self) -> list[str]:
        return [str(item["output"]) for item in self.shown[-1] if item.get("type") == "function_call_output"]


def config(client, **options) -> RunConfig:
    return RunConfig(tracing_disabled=True, sandbox=SandboxRunConfig(client=client, **options))


def coder(model, **options) -> SandboxAgent:
    return SandboxAgent(name="coder", model=model, capabilities=[Shell(), Filesystem()], **options)


@pytest.fixture
async def client():
    client = FumehoodSandboxClient()
    yield client
    for box in client._held.values():
        await box.close()


@pytest.fixture
async def session(client):
    session = await client.create(options=None)
    async with session:
        yield session
    await client.delete(session)


async def test_a_scripted_agent_works_in_the_sandbox_by_shell_and_its_end_ends_the_sandbox(client, tmp_path):
    (tmp_path / "secret").write_text(RAN_AS_ROOT_MARK)
    model = Script(
        calls("exec_command", cmd="pwd; cat notes/todo.md; echo made > made.txt"),
        calls("exec_command", cmd=f"cat made.txt; cat {tmp_path}/secret; exit 3"),
        says("done"),
    )
    manifest = Manifest(entries={"notes/todo.md": File(content=b"from the manifest")})
    result = await Runner.run(coder(model), "work", run_config=config(client, manifest=manifest))
    assert result.final_output == "done" and {"exec_command", "write_stdin"} <= set(model.tools)
    first, second = model.outputs()
    assert WORKSPACE in first and "from the manifest" in first
    assert "made" in second and "exited with code 3" in second and RAN_AS_ROOT_MARK not in second
    assert not client._held, "the SDK deletes the session of a run, and with it the sandbox"


async def test_a_terminal_stays_between_tool_calls_and_takes_input(client):
    def answer(model: Script):
        number = int(model.outputs()[-1].split("session ID ")[1].split()[0])
        return calls("write_stdin", session_id=number, chars="40 + 2\nexit()\n", yield_time_ms=3000)

    start = calls("exec_command", cmd="python3 -q", tty=True, yield_time_ms=600)
    model = Script(start, answer, says("done"))
    await Runner.run(coder(model), "work", run_config=config(client))
    started, answered = model.outputs()
    assert "running with session ID" in started
    assert "42" in answered and "exited with code 0" in answered


async def test_files_go_in_and_out_as_bytes(session):
    import io

    await session.write("deep/a.bin", io.BytesIO(b"\xff\0\n"))
    assert (await session.read("deep/a.bin")).read() == b"\xff\0\n"
    assert await session.read_bounded("deep/a.bin", max_bytes=2) == b"\xff\0"
    await session.mkdir("d", parents=True)
    assert {"deep", "d"} <= {entry.path.rsplit("/", 1)[-1] for entry in await session.ls(".")}
    await session.rm("deep", recursive=True)
    with pytest.raises(WorkspaceReadNotFoundError):
        await session.read("deep/a.bin")


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd"])
async def test_a_path_out_of_the_workspace_is_refused(session, path):
    with pytest.raises(Exception, match="manifest path must"):
        await session.read(path)


async def test_exec_tells_exit_codes_timeouts_and_what_the_host_ended(session):
    ok = await session.exec("printf a; printf b >&2; exit 7")
    assert (ok.stdout, ok.stderr, ok.exit_code) == (b"a", b"b", 7)
    with pytest.raises(ExecTimeoutError):
        await session.exec("sleep 60", timeout=0.3)
    signalled = await session.exec("kill -TERM $$")
    assert signalled.exit_code == 137 and b"signal 15" in signalled.stderr
    bomb = await session.exec("python3 -c \"x = bytearray(1 << 30); x[::4096] = b'1' * len(x[::4096])\"")
    assert bomb.exit_code != 0 and (b"oom" in bomb.stderr or b"MemoryError" in bomb.stderr)


async def test_another_user_is_refused_and_not_ignored(session):
    with pytest.raises(Unsupported, match="one user"):
        await session.exec("id", user="root")


async def test_the_manifests_environment_is_set_for_each_program(client):
    session = await client.create(manifest=Manifest(environment={"value": {"A": "b"}}), options=None)
    async with session:
        assert (await session.exec("echo $A $HOME")).stdout.decode().split() == ["b", WORKSPACE]
    await client.delete(session)


async def test_a_session_resumes_in_its_own_sandbox_while_it_lives(client):
    session = await client.create(options=None)
    async with session:
        await session.exec("echo kept > a")
        state = client.deserialize_session_state(client.serialize_session_state(session.state))
        again = await client.resume(state)
        await again.start()
        assert (await again.exec("cat a")).stdout == b"kept\n" and len(client._held) == 1
    await client.delete(session)


async def test_a_snapshot_is_restored_into_a_new_sandbox_when_the_old_one_is_gone(client, tmp_path):
    session = await client.create(snapshot=LocalSnapshotSpec(base_path=tmp_path), options=None)
    async with session:
        await session.exec("mkdir d; echo kept > d/a; ln -s /etc/passwd link; mkfifo pipe")
    state = client.serialize_session_state(session.state)
    await client.delete(session)
    assert not client._held and "api_key" not in json.dumps(state)
    again = await client.resume(client.deserialize_session_state(state))
    async with again:
        assert (await again.exec("cat d/a; readlink link")).stdout == b"kept\n/etc/passwd\n"
    await client.delete(again)


async def test_options_choose_policy_and_limits_of_a_session(client):
    session = await client.create(options=FumehoodOptions(policy="strict", limits={"pids": 16}))
    box = client._held[session.state.sandbox_id]
    assert box.spec.policy_name == "strict" and box.spec.limits.pids == 16
    await client.delete(session)


async def test_delete_ends_every_process_and_may_be_repeated(client):
    session = await client.create(options=None)
    await session.start()
    started = await session.pty_exec_start("sleep 600", yield_time_s=0.25)
    assert started.process_id is not None and started.exit_code is None
    box = client._held[session.state.sandbox_id]
    supervisor, sandbox_id = box.engine.supervisor, box.id
    await client.delete(session)
    await client.delete(session)
    with pytest.raises(NotFound):
        supervisor.get(sandbox_id)


async def test_the_output_of_a_terminal_that_nobody_reads_is_bounded(session):
    started = await session.pty_exec_start("yes", yield_time_s=0.25)
    terminal = session._inner._terminals[started.process_id]
    await asyncio.sleep(0.5)
    assert len(started.output) + sum(map(len, terminal.chunks)) < (1 << 20) + 100 and b"left out" in started.output
    await session.pty_terminate_all()
    assert not session._inner._terminals


async def test_the_plain_tool_keeps_state_and_tells_errors_to_the_model():
    async with AsyncSandbox() as box:
        model = Script(
            calls("run_python", code="x = 41"),
            calls("run_python", code="x + 1"),
            calls("run_python", code="1 / 0"),
            calls("run_python", code="while True: pass", timeout_s=0.3),
            says("done"),
        )
        agent = Agent(name="plain", model=model, tools=[run_python(box)])
        result = await Runner.run(agent, "compute", run_config=RunConfig(tracing_disabled=True))
    assert result.final_output == "done"
    _, answer, error, late = model.outputs()
    assert "42" in answer and "ZeroDivisionError" in error and "status: timeout" in late


@pytest.mark.data
async def test_the_plain_tool_gives_a_chart_as_an_image():
    async with AsyncSandbox(policy="data-analysis") as box:
        model = Script(calls("run_python", code="import matplotlib.pyplot as plt; plt.plot([1]); plt.show()"), says("done"))
        agent = Agent(name="plain", model=model, tools=[run_python(box)])
        await Runner.run(agent, "draw", run_config=RunConfig(tracing_disabled=True))
    assert "input_image" in model.outputs()[0] and "data:image/png;base64," in model.outputs()[0]


async def test_the_plain_tool_says_that_its_sandbox_ended():
    async with AsyncSandbox() as box:
        await box.kill()
        model = Script(calls("run_python", code="1"), says("done"))
        agent = Agent(name="plain", model=model, tools=[run_python(box)])
        await Runner.run(agent, "compute", run_config=RunConfig(tracing_disabled=True))
    assert "sandbox_gone" in model.outputs()[0]
