"""`fumehood mcp` as an AI client meets it: a real process, driven by the official client over its pipes."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import subprocess
import sys
import uuid

import jsonschema_rs
import pytest
from mcp_seen import marked, text, until

from mcp import Client

TOOLS = {
    "run_code", "exec", "read_file", "write_file", "list_files", "checkpoint", "snapshot", "rollback",
    "create_sandbox", "fork_sandbox", "list_sandboxes", "kill_sandbox",
}  # fmt: skip
# The handshake of every client in use, and the newest generation without one.
MODES = ("legacy", "auto")


async def test_each_tool_has_a_description_and_a_valid_schema_whose_arguments_are_described(stdio):
    async with Client(stdio()) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == TOOLS
    for tool in tools.values():
        assert tool.description and len(tool.description) > 30
        jsonschema_rs.meta.validate(tool.input_schema)
        for name, schema in tool.input_schema.get("properties", {}).items():
            assert schema.get("description"), f"{tool.name}.{name}"


@pytest.mark.parametrize("mode", MODES)
async def test_state_stays_between_the_calls_of_a_session(stdio, mode):
    async with Client(stdio(), mode=mode) as client:
        first = await client.call_tool("run_code", {"code": "x = 41; print('hello')"})
        second = await client.call_tool("run_code", {"code": "x + 1"})
        bash = await client.call_tool("run_code", {"code": "echo $((6 * 7))", "language": "bash"})
        assert len((await client.call_tool("list_sandboxes", {})).structured_content["sandboxes"]) == 1
    assert not first.is_error and first.structured_content["stdout"] == "hello\n" and text(first) == "hello"
    assert second.structured_content["results"][0]["data"]["text/plain"] == "42" and text(second) == "42"
    assert second.structured_content["status"] == "ok" and "42" in text(bash)


@pytest.mark.data
async def test_a_chart_comes_back_as_image_content(stdio):
    code = "import matplotlib.pyplot as plt; plt.plot([1, 2, 4]); plt.show()"
    async with Client(stdio("--policy", "data-analysis")) as client:
        answer = await client.call_tool("run_code", {"code": code})
    images = [block for block in answer.content if block.type == "image"]
    assert len(images) == 1 and images[0].mime_type == "image/png"
    assert base64.b64decode(images[0].data).startswith(b"\x89PNG")
    assert "image/png" not in json.dumps(answer.structured_content)  # once is enough of half a megabyte


async def test_exec_gives_output_exit_code_and_reads_stdin(stdio):
    async with Client(stdio()) as client:
        sorted_ = await client.call_tool("exec", {"command": "sort; pwd", "stdin": "b\na\n", "cwd": "/tmp"})
        failed = await client.call_tool("exec", {"command": "echo no >&2; exit 3"})
        late = await client.call_tool("exec", {"command": "sleep 30", "timeout_s": 0.3})
    assert sorted_.structured_content["stdout"] == "a\nb\n/tmp\n" and not sorted_.is_error
    assert failed.is_error and failed.structured_content["exit_code"] == 3 and "exit code: 3\nstderr:\nno" in text(failed)
    assert late.is_error and late.structured_content["status"] == "timeout" and "status: timeout" in text(late)


async def test_files_are_written_listed_and_read(stdio):
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 20).decode()
    make = f"import base64; open('p.png','wb').write(base64.b64decode('{png}')); open('b.bin','wb').write(b'\\xff\\0')"
    async with Client(stdio()) as client:
        written = await client.call_tool("write_file", {"path": "notes/a.txt", "content": "grüße"})
        await client.call_tool("run_code", {"code": make})
        listed = await client.call_tool("list_files", {"path": "~", "depth": 2})
        read = await client.call_tool("read_file", {"path": "notes/a.txt"})
        picture = await client.call_tool("read_file", {"path": "p.png"})
        binary = await client.call_tool("read_file", {"path": "b.bin"})
        missing = await client.call_tool("read_file", {"path": "nope"})
        huge = await client.call_tool("exec", {"command": "truncate -s 1T sparse || truncate -s 4M sparse"})
        refused = await client.call_tool("read_file", {"path": "sparse"})
    assert written.structured_content["size_bytes"] == len("grüße".encode()) and text(read) == "grüße"
    assert {"a.txt", "p.png"} <= {entry["name"] for entry in listed.structured_content["entries"]}
    assert picture.content[0].type == "image" and picture.content[0].data == png
    assert base64.b64decode(binary.structured_content["base64"]) == b"\xff\0"
    assert missing.is_error and missing.structured_content["error"]["code"] == "not_found"
    assert not huge.is_error and refused.is_error and refused.structured_content["error"]["code"] == "invalid_input"


async def test_rollback_undoes_variables_and_files_since_the_checkpoint(stdio):
    async with Client(stdio()) as client:
        await client.call_tool("run_code", {"code": "x = 1; open('kept', 'w').write('k')"})
        kept = (await client.call_tool("checkpoint", {})).structured_content["checkpoint"]
        await client.call_tool("run_code", {"code": "x = 2; import os; os.remove('kept')"})
        assert not (await client.call_tool("rollback", {"checkpoint": kept})).is_error
        after = await client.call_tool("run_code", {"code": "x, open('kept').read()"})
        unknown = await client.call_tool("rollback", {"checkpoint": "never"})
    assert text(after) == "(1, 'k')"
    assert unknown.is_error and unknown.structured_content["error"]["code"] in ("not_found", "invalid_input")


async def test_a_hostile_program_is_contained_and_the_model_is_told(stdio, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    async with Client(stdio()) as client:
        peek = await client.call_tool("exec", {"command": f"cat {secret}"})
        mount = await client.call_tool("exec", {"command": "python3 -c 'import ctypes; ctypes.CDLL(None).unshare(0x10000000)'"})
        dials = await client.call_tool("exec", {"command": "exec 3<>/dev/tcp/169.254.169.254/80"})
        fills = await client.call_tool("run_code", {"code": "x = bytearray(2 << 30); x[::4096] = b'1' * len(x[::4096])"})
        after = await client.call_tool("run_code", {"code": "'still here'"})
    assert peek.is_error and "of the host" not in text(peek)
    assert "unshare" in text(mount) and mount.structured_content["refused_syscalls"][0]["name"] == "unshare"
    assert dials.is_error
    assert fills.is_error and (fills.structured_content["status"] == "oom" or "MemoryError" in text(fills))
    assert not after.is_error or after.structured_content["error"]["code"] == "sandbox_gone"


async def test_output_is_bounded_and_says_so(stdio):
    async with Client(stdio()) as client:
        answer = await client.call_tool("run_code", {"code": "print('a' * 300_000); print('the end')"})
    assert len(text(answer)) < 40_000 and "characters left out" in text(answer) and text(answer).endswith("the end")
    assert answer.structured_content["stdout_truncated"] and len(json.dumps(answer.structured_content)) < 60_000


@pytest.mark.parametrize("sandbox_id", ["s0123456789abcdef", "../../etc", "", "a" * 5000])
async def test_an_unknown_sandbox_id_is_a_tool_error_that_says_what_to_do_h14(stdio, sandbox_id):
    async with Client(stdio()) as client:
        for tool, arguments in (("run_code", {"code": "1"}), ("kill_sandbox", {}), ("read_file", {"path": "a"})):
            answer = await client.call_tool(tool, {**arguments, "sandbox_id": sandbox_id})
            error = answer.structured_content["error"]
            assert answer.is_error and error["code"] in ("not_found", "invalid_input") and error["remediation"]
            assert "Traceback" not in text(answer) and len(text(answer)) < 1000


async def test_wrong_arguments_are_a_tool_error_and_no_stack_trace(stdio):
    async with Client(stdio()) as client:
        for arguments in ({}, {"code": 5}, {"code": "1", "timeout_s": -1}, {"code": "1", "language": "cobol"}):
            answer = await client.call_tool("run_code", arguments)
            assert answer.is_error and "Traceback" not in text(answer)
            assert answer.structured_content["error"]["code"] == "invalid_input", text(answer)


async def test_several_sandboxes_are_told_apart_by_id_and_end_one_by_one(stdio):
    async with Client(stdio()) as client:
        made = (await client.call_tool("create_sandbox", {"policy": "strict", "env": {"A": "b"}})).structured_content
        other = {"sandbox_id": made["sandbox_id"]}
        await client.call_tool("run_code", {"code": "x = 'default'"})
        elsewhere = await client.call_tool("run_code", {"code": "import os; os.environ['A'], 'x' in globals()", **other})
        assert text(elsewhere) == "('b', False)"
        assert not (await client.call_tool("kill_sandbox", other)).is_error
        assert (await client.call_tool("run_code", {"code": "1", **other})).is_error
        rows = (await client.call_tool("list_sandboxes", {})).structured_content["sandboxes"]
    assert [row["default"] for row in rows] == [True]


async def test_a_model_can_choose_a_preset_but_no_file_and_nothing_where_the_operator_chose_h11(stdio, tmp_path):
    loose = tmp_path / "loose.toml"
    loose.write_text('extends = "permissive"\n')
    async with Client(stdio()) as client:
        by_path = await client.call_tool("create_sandbox", {"policy": f"./{loose.name}"})
    async with Client(stdio("--policy", "strict")) as client:
        weaker = await client.call_tool("create_sandbox", {"policy": "permissive"})
        await client.call_tool("run_code", {"code": "1"})
        rows = (await client.call_tool("list_sandboxes", {})).structured_content["sandboxes"]
    assert by_path.structured_content["error"]["code"] == weaker.structured_content["error"]["code"] == "forbidden"
    assert [row["policy"] for row in rows] == ["strict"]


async def test_a_model_in_a_loop_gets_no_more_than_its_places(stdio):
    async with Client(stdio()) as client:
        answers = [await client.call_tool("create_sandbox", {}) for _ in range(9)]
    assert [answer.is_error for answer in answers] == [False] * 8 + [True]
    assert answers[8].structured_content["error"]["code"] == "capacity_exceeded"


async def test_a_default_sandbox_that_died_is_replaced_after_the_model_was_told(stdio):
    async with Client(stdio("--policy", _short_lived(stdio))) as client:
        await client.call_tool("run_code", {"code": "x = 1"})
        await asyncio.sleep(1.5)  # past its lifetime
        told = await client.call_tool("run_code", {"code": "x"})
        again = await client.call_tool("run_code", {"code": "'x' in globals()"})
    assert told.is_error and "sandbox_gone" in text(told) and "call again" in text(told)
    assert text(again) == "False"


def _short_lived(stdio) -> str:
    path = stdio().cwd / "short.toml"
    path.write_text('extends = "default"\n[limits]\nlifetime_s = 1.0\ntimeout_s = 1.0\n')
    return str(path)


@pytest.mark.parametrize("mode", MODES)
async def test_the_end_of_a_session_ends_its_sandboxes(stdio, mode):
    marker = uuid.uuid4().hex
    async with Client(stdio(), mode=mode) as client:
        await client.call_tool("exec", {"command": f"exec -a {marker} sleep 600 & disown"})
        await client.call_tool("create_sandbox", {})
        started = marked(f"{marker}\x00600")
    assert len(started) == 1, "the program must have been there"
    await until(lambda: not marked(f"{marker}\x00600"))


async def test_a_call_that_the_client_gives_up_is_stopped_inside(stdio):
    marker = uuid.uuid4().hex
    async with Client(stdio(), mode="legacy") as client:
        call = asyncio.ensure_future(client.call_tool("exec", {"command": f"exec -a {marker} sleep 600"}))
        await until(lambda: marked(f"{marker}\x00600"))
        call.cancel()
        await until(lambda: not marked(f"{marker}\x00600"))
        assert text(await client.call_tool("run_code", {"code": "1 + 1"})) == "2"


def _raw(stdio) -> subprocess.Popen[bytes]:
    server = stdio()
    return subprocess.Popen(
        [server.command, *server.args], env=server.env, cwd=server.cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _say(server: subprocess.Popen[bytes], **message: object) -> None:
    assert server.stdin is not None
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    server.stdin.flush()


async def _busy(server: subprocess.Popen[bytes], marker: str) -> None:
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    _say(server, id=1, method="initialize", params=hello)
    _say(server, method="notifications/initialized")
    command = {"command": f"exec -a {marker} sleep 600"}
    _say(server, id=2, method="tools/call", params={"name": "exec", "arguments": command})
    await until(lambda: marked(f"{marker}\x00600"))


@pytest.mark.parametrize("end", ["vanished client", "SIGTERM", "SIGINT", "SIGKILL"])
async def test_a_client_that_vanishes_mid_call_or_a_signal_leaves_no_process(stdio, end):
    marker, server = uuid.uuid4().hex, _raw(stdio)
    try:
        await _busy(server, marker)
        if end == "vanished client":
            server.stdin.close()
        else:
            server.send_signal(getattr(signal, end))
        await asyncio.to_thread(server.wait, 15)
        await until(lambda: not marked(f"{marker}\x00600"))
        lines = server.stdout.read().splitlines()
        assert [json.loads(line)["jsonrpc"] for line in lines] == ["2.0"] * len(lines) and lines
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()


async def test_lines_that_are_no_messages_do_not_end_the_server(stdio):
    server = _raw(stdio)
    try:
        server.stdin.write(b"garbage\n\xff\xfe\n{}\n[1]\n" + b"[" * 20_000 + b"\n")
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
        _say(server, id=7, method="initialize", params=hello)
        async with asyncio.timeout(15):
            while json.loads(await asyncio.to_thread(server.stdout.readline)).get("id") != 7:
                pass
    finally:
        server.stdin.close()
        assert await asyncio.to_thread(server.wait, 15) == 0
        server.stdout.close()


def test_the_verb_explains_itself():
    shown = subprocess.run(
        [sys.executable, "-c", "from fumehood.cli import main; main()", "mcp", "--help"], capture_output=True, text=True
    )
    assert shown.returncode == 0 and "--policy" in shown.stdout and "--url" in shown.stdout


async def test_where_no_snapshots_are_the_model_is_told_what_to_use_instead(stdio):
    async with Client(stdio()) as client:
        await client.call_tool("run_code", {"code": "x = 1"})
        for tool, arguments in (("snapshot", {}), ("fork_sandbox", {"count": 2})):
            answer = await client.call_tool(tool, arguments)
            error = answer.structured_content["error"]
            assert answer.is_error and error["code"] == "unsupported" and error["remediation"], tool
        too_many = await client.call_tool("fork_sandbox", {"count": 8})
        strange = await client.call_tool("rollback", {"checkpoint": "p0123456789abcdef"})
        after = await client.call_tool("run_code", {"code": "x + 1"})
    assert too_many.is_error and too_many.structured_content["error"]["code"] == "invalid_input"
    assert strange.structured_content["error"]["code"] == "not_found"
    assert text(after) == "2"
