"""Attacks on what runs and reports the code (H16), and a hostile agent against the host's end of the channel."""

import asyncio
import json
import socket
import struct

import pytest
from attack import PRELUDE, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fumehood import Sandbox
from fumehood.agent import wire
from fumehood.errors import FumehoodError
from fumehood.execution import Capture, Sinks, follow
from fumehood.model import Limits
from fumehood.runtime.link import Link

pytestmark = pytest.mark.rootless


def test_frames_written_to_every_inherited_descriptor_change_no_other_result(box: Sandbox) -> None:
    """H16: a forged END, result and error on all that a run holds; the next run, in a new context, is what it is."""
    forged = [wire.encode_json(n, kind, {"ok": {"outcome": "ok", "exit_code": 0}}) for n in range(1, 9) for kind in (3, 4)]
    box.run(PRELUDE + f"for fd in range(3, 64):\n    for frame in {forged!r}: attempt(os.write, fd, frame)")
    fresh = box.contexts.create()
    assert box.run("6 * 7", context=fresh.id).text == "42"
    assert box.exec("exit 3").exit_code == 3


def test_the_agent_can_be_neither_read_nor_traced(box: Sandbox) -> None:
    """H16"""
    code = "attempt(open, '/proc/1/mem', 'rb'); attempt(os.listdir, '/proc/1/fd'); attempt(syscall, 101, 16, 1, 0, 0)\n"
    code += "attempt(syscall, 310, 1, 0, 0, 0, 0, 0); attempt(syscall, 438, os.pidfd_open(1), 0, 0)"
    assert set(words(box, code)) <= {"EACCES", "EPERM", "ENOSYS"}


def test_a_rewritten_interpreter_lives_in_its_own_process_only(box: Sandbox) -> None:
    """H16: builtins, the output streams and IPython replaced; a fresh context and another sandbox know nothing of it."""
    poison = (
        "import builtins, os, sys, json\nbuiltins.len = lambda x: 666\njson.dumps = os.write = None\nsys.modules['math'] = None"
    )
    box.run(poison)
    fresh = box.contexts.create()
    assert box.run("import math; len('abc'), math.floor(2.5)", context=fresh.id).text == "(3, 2)"
    with Sandbox(tier="native") as other:
        assert other.run("import math; len('abc')").text == "3"


def test_the_hosts_facts_are_not_the_guests_to_tell(box: Sandbox) -> None:
    """H16: it prints what it likes; status, usage and refused calls are measured outside."""
    result = box.run(PRELUDE + 'attempt(syscall, 321, 0, 0, 0)\nprint(\'{"refused_syscalls": [], "usage": 0}\')\nos._exit(0)')
    assert [r.name for r in result.refused_syscalls] == ["bpf"] and result.usage.wall_s > 0


def test_a_run_that_kills_its_own_session_spoils_only_itself(box: Sandbox) -> None:
    """H16"""
    assert box.run("import os; os.kill(os.getpid(), 9)").status != "ok"
    assert box.run("1 + 1").text == "2"


# -- a hostile agent: everything it may send, well formed, nearly so, and not at all
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["ok", "error", "type", "pid", "outcome", "exit_code", "signal", "changed", "data", "execution_count", "context", "code"]
)
WORDS = st.sampled_from(["started", "result", "error", "count", "ok", "died", "invalid"])
OBJECT = st.dictionaries(KEYS, JSON | WORDS | st.dictionaries(KEYS, JSON | WORDS, max_size=4), max_size=5)
FRAME = st.one_of(
    st.builds(lambda n, k, v: wire.encode_json(n, k, v), st.integers(0, 3), st.integers(0, 8), OBJECT),
    st.builds(lambda n, k, p: wire.encode(n, k, p), st.integers(0, 3), st.integers(0, 8), st.binary(max_size=40)),
    st.builds(lambda n, s, k, p: struct.pack(">IIB", n, s, k) + p, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
              st.integers(0, 255), st.binary(max_size=40)),
    st.binary(max_size=40),
)  # fmt: skip
HELLO = wire.encode_json(0, wire.HELLO, {"generation": wire.GENERATION})


async def converse(said: bytes) -> None:
    """One run against an agent that says this and hangs up. Only a FumehoodError may come of it."""
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    link = Link(*await asyncio.open_unix_connection(sock=ours))
    try:
        async with asyncio.timeout(5):  # a hang is the failure that this is here to find
            await link.start(1)
            stream = await link.open("exec.start", argv=["x"])
            done = await follow(link, stream, "context.run", Capture(Limits(), Sinks()), 0.5, lambda cause: asyncio.sleep(0))
            done.changes(), done.number("exit_code")
    except FumehoodError:
        pass
    finally:
        await link.aclose()
        theirs.close()


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(FRAME, max_size=8))
def test_whatever_an_agent_sends_ends_in_a_typed_error_or_a_result(polite: bool, frames: list[bytes]) -> None:
    """H16: random, malformed and misdirected frames, with and without a proper HELLO."""
    asyncio.run(converse((HELLO if polite else b"") + b"".join(frames)))


@pytest.mark.parametrize(
    "said",
    [
        wire.encode_json(1, wire.END, {"ok": [1]}),
        wire.encode_json(1, wire.END, {"error": "text"}),
        wire.encode_json(1, wire.END, {"ok": {"changed": [{"kind": "created", "size": "much"}, 7], "exit_code": 2**70}}),
        wire.encode(1, wire.END, b"[" * 200_000),
        wire.encode(1, wire.END, b'{"ok":{"exit_code":' + b"9" * 9999 + b"}}"),
        wire.encode_json(1, wire.EVENT, {"type": "error", "name": {}, "traceback": ["x"]}) + wire.encode_json(1, wire.END, {}),
        struct.pack(">IIB", 2**32 - 1, 1, wire.DATA),
        wire.encode(1, wire.EVENT, json.dumps({"type": "result", "data": {"x": 10**30}}).encode()),
    ],
    ids=["list", "error-text", "changes", "deep", "digits", "error-types", "length", "half"],
)
def test_known_tricks_of_a_hostile_agent_are_typed(said: bytes) -> None:
    """H16: each of these has broken a decoder somewhere."""
    asyncio.run(converse(HELLO + said))
