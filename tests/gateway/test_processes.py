"""Programs and contexts in a sandbox over HTTP: followed by sockets, signalled, fed, resized, joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from callers import eventually, problem, run, socket
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection

from fumehood.agent import wire


def begun(talking: ClientConnection, **asked: Any) -> int:
    """The pid of what was asked for."""
    talking.send(json.dumps(asked))
    return started(talking)


def started(talking: ClientConnection) -> int:
    said = json.loads(talking.recv())
    assert said["event"]["type"] == "started", said
    found: int = said["event"]["pid"]
    return found


def rest(talking: ClientConnection) -> tuple[dict[int, bytes], dict[str, Any]]:
    """What was written on each channel, and the last message."""
    written: dict[int, bytes] = {}
    last: dict[str, Any] = {}
    for message in talking:
        if isinstance(message, bytes):
            written[message[0]] = written.get(message[0], b"") + message[1:]
        else:
            last = json.loads(message)
    assert talking.close_code == 1000
    return written, last


def until(talking: ClientConnection, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        message = talking.recv(30)
        assert isinstance(message, bytes), (seen, message)
        seen += message[1:]
    return seen


def pids(http: httpx.Client, box: str) -> set[int]:
    return {process["pid"] for process in http.get(f"{box}/processes").raise_for_status().json()["processes"]}


@pytest.fixture
def cat(alice: httpx.Client, box: str) -> Iterator[tuple[ClientConnection, str]]:
    """A program that repeats its input, followed; and its path."""
    with socket(alice, f"{box}/processes") as talking:
        yield talking, f"{box}/processes/{begun(talking, argv=['cat'], stdin=True, tag='mine')}"


def test_a_program_says_all_of_it_on_its_channels_and_how_it_ended(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/processes") as talking:
        begun(talking, argv=["sh", "-c", "echo out; echo err >&2; pwd; echo $WHO; exit 3"], cwd="/tmp", env={"WHO": "me"})
        written, last = rest(talking)
    assert written == {wire.STDOUT: b"out\n/tmp\nme\n", wire.STDERR: b"err\n"}
    assert last["end"]["exit_code"] == 3


def test_input_goes_by_the_socket_and_ends_there(cat: tuple[ClientConnection, str]) -> None:
    talking, _ = cat
    talking.send(bytes([wire.STDIN]) + b"\xff\0 any bytes")
    talking.send(json.dumps({"close_input": True}))
    written, last = rest(talking)
    assert written[wire.STDOUT] == b"\xff\0 any bytes" and last["end"]["exit_code"] == 0


def test_input_goes_by_requests_and_ends_there(alice: httpx.Client, cat: tuple[ClientConnection, str]) -> None:
    talking, path = cat
    large = bytes(range(256)) * 1_024
    assert alice.put(f"{path}/stdin", content=large).status_code == 204
    assert alice.put(f"{path}/stdin", content=b"").status_code == 204
    assert alice.delete(f"{path}/stdin").status_code == 204
    written, last = rest(talking)
    assert written[wire.STDOUT] == large and last["end"]["exit_code"] == 0


def test_a_signal_reaches_the_program(alice: httpx.Client, cat: tuple[ClientConnection, str]) -> None:
    talking, path = cat
    assert alice.post(f"{path}/signal", json={"signal": 15}).status_code == 204
    assert rest(talking)[1]["end"]["signal"] == 15
    problem(alice.post(f"{path}/signal", json={"signal": 15}), 404, "not_found")


@pytest.mark.parametrize("body", [{"signal": 0}, {"signal": 65}, {"signal": "SIGKILL"}, {"signal": True}, {}])
def test_what_is_no_signal_is_refused(alice: httpx.Client, cat: tuple[ClientConnection, str], body: dict[str, Any]) -> None:
    problem(alice.post(f"{cat[1]}/signal", json=body), 422, "invalid_input")


def test_a_terminal_has_the_size_that_was_asked_for_and_takes_another(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/processes") as talking:
        pid = begun(talking, argv=["bash", "--norc"], pty={"rows": 10, "cols": 33}, stdin=True)
        talking.send(bytes([wire.STDIN]) + b"stty size\n")
        assert b"10 33" in until(talking, b"10 33")
        assert alice.post(f"{box}/processes/{pid}/resize", json={"rows": 11, "cols": 44}).status_code == 204
        talking.send(bytes([wire.STDIN]) + b"stty size; exit\n")
        until(talking, b"11 44")
        rest(talking)


def test_who_leaves_follows_no_longer_and_can_join_again_and_so_can_others(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/processes") as talking:
        pid = begun(talking, argv=["cat"], stdin=True)
    assert pid in pids(alice, box)
    path = f"{box}/processes/{pid}"
    with socket(alice, path) as first, socket(alice, path) as second:
        assert started(first) == started(second) == pid
        alice.put(f"{path}/stdin", content=b"for all").raise_for_status()
        assert until(first, b"for all") == until(second, b"for all")
        first.send(json.dumps({"cancel": True}))
        rest(first)
        assert pid in pids(alice, box)
        alice.delete(f"{path}/stdin").raise_for_status()
        assert rest(second)[1]["end"]["exit_code"] == 0
    eventually(lambda: pid not in pids(alice, box))


def test_the_list_says_what_runs(alice: httpx.Client, box: str, cat: tuple[ClientConnection, str]) -> None:
    found = alice.get(f"{box}/processes").json()["processes"]
    assert [(p["argv"], p["tag"], p["pty"]) for p in found] == [(["cat"], "mine", False)]


def test_to_follow_what_is_not_there_is_a_problem_and_the_end(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/processes/9999") as talking:
        assert rest(talking)[1]["problem"]["code"] == "not_found"
    with pytest.raises(InvalidStatus):
        socket(alice, f"{box}/processes/x")


def test_the_end_of_the_sandbox_is_the_last_message(alice: httpx.Client, box: str, cat: tuple[ClientConnection, str]) -> None:
    alice.delete(box).raise_for_status()
    assert rest(cat[0])[1]["problem"]["code"] == "sandbox_gone"


def test_a_directory_is_watched_as_it_changes(alice: httpx.Client, box: str) -> None:
    with socket(alice, f"{box}/files/watch?path=.&recursive=true") as talking:
        assert json.loads(talking.recv())["event"]["type"] == "ready"
        alice.put(f"{box}/files", params={"path": "seen"}, content=b"x").raise_for_status()
        names = {json.loads(talking.recv(30))["event"]["name"] for _ in range(2)}
        assert any("seen" in name for name in names)
    with socket(alice, f"{box}/files/watch?path=nothing") as talking:
        assert rest(talking)[1]["problem"]["code"] == "not_found"


def test_messages_that_are_none_end_in_a_problem(alice: httpx.Client, box: str) -> None:
    for wrong in ("x", "[]", "[" * 50_000):
        with socket(alice, f"{box}/processes") as talking:
            begun(talking, argv=["cat"], stdin=True)
            talking.send(wrong)
            assert rest(talking)[1]["problem"]["code"] == "invalid_input"


def test_contexts_have_a_state_of_their_own_and_their_ends(alice: httpx.Client, box: str) -> None:
    made = alice.post(f"{box}/contexts", json={"language": "python", "cwd": "/tmp", "id": "mine"})
    assert (made.status_code, made.json()) == (201, {"id": "mine", "language": "python", "cwd": "/tmp"})
    run(alice, box, "x = 1", context="mine")
    assert run(alice, box, "x")["status"] == "error"
    assert run(alice, box, "import os; (x, os.getcwd())", context="mine")["results"][0]["data"]["text/plain"] == "(1, '/tmp')"
    assert {c["id"] for c in alice.get(f"{box}/contexts").json()["contexts"]} == {"python", "mine"}
    assert alice.post(f"{box}/contexts/mine/restart").status_code == 204
    assert run(alice, box, "x", context="mine")["error"]["name"] == "NameError"
    assert alice.delete(f"{box}/contexts/mine").status_code == 204
    for method, end in (("DELETE", ""), ("POST", "/restart"), ("POST", "/interrupt")):
        problem(alice.request(method, f"{box}/contexts/mine{end}"), 404, "not_found")
    problem(alice.post(f"{box}/executions", json={"code": "1", "context": "mine"}), 404, "not_found")


def test_an_interrupt_stops_the_run_and_keeps_the_state(alice: httpx.Client, box: str) -> None:
    run(alice, box, "x = 5")
    name = alice.post(f"{box}/executions", json={"code": "import time; time.sleep(60)", "wait": False}).json()["id"]
    eventually(lambda: alice.get(f"/v1/executions/{name}").json()["state"] == "running")
    eventually(
        lambda: (
            alice.post(f"{box}/contexts/python/interrupt").status_code == 204
            and alice.get(f"/v1/executions/{name}").json()["state"] == "done"
        )
    )
    assert run(alice, box, "x")["results"][0]["data"]["text/plain"] == "5"


def test_a_checkpoint_brings_state_and_files_back(alice: httpx.Client, box: str) -> None:
    run(alice, box, "x = 1; open('f', 'w').write('1')")
    made = alice.post(f"{box}/checkpoints", json={}).raise_for_status().json()["checkpoint"]
    run(alice, box, "x = 2; open('f', 'w').write('2')")
    assert alice.post(f"{box}/rollback", json={"checkpoint": made}).status_code == 204
    assert run(alice, box, "(x, open('f').read())")["results"][0]["data"]["text/plain"] == "(1, '1')"
    for wrong in ("python:check99", "nonsense", "../../x", ""):
        answer = alice.post(f"{box}/rollback", json={"checkpoint": wrong})
        problem(answer, answer.status_code, answer.json()["code"])
        assert answer.status_code in (404, 422)


def test_a_fork_is_not_of_this_tier(alice: httpx.Client, box: str) -> None:
    problem(alice.post(f"{box}/fork", json={"count": 2}), 501, "unsupported")
