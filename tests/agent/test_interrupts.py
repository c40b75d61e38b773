"""Whose interrupt it is, and that it costs nobody's state: a run is interrupted, cancelled, and followed by another at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fumehood.agent import wire

from .conftest import Client, StartAgent
from .session_driver import Client as Session
from .session_driver import Zygote

TIMES = 150  # one in nine was hit
BIG = 4_000  # functions in a file that takes longer to parse than a cancelled run may take to end


@pytest.fixture
def agent(start_agent: StartAgent) -> Client:
    client = start_agent("--preload")
    client.hello()
    client.run("kept = 0")
    return client


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    zygote = Zygote(["json"])
    client = zygote.session(tmp_path)
    client.run("1")
    yield client
    client.close()
    zygote.close()


def cancelled(agent: Client, code: str) -> str:
    """What became of a run that was cancelled at its first output."""
    stream = agent.open("context.run", code=code)
    agent.wait_output(stream, b"go")
    agent.send(stream, wire.CANCEL)
    ok = agent.finish(stream).ok
    assert ok is not None
    return ok["outcome"]


def test_an_interrupt_that_crosses_the_end_of_its_run_never_hits_the_next_one(agent: Client) -> None:
    for n in range(TIMES):
        first = agent.open("context.run", code="print('go', flush=True)")
        agent.wait_output(first, b"go")
        agent.send(first, wire.CANCEL)
        second = agent.open("context.run", code="kept += 1\nprint(kept)")
        assert agent.finish(first).ok
        answer = agent.finish(second)
        assert answer.stdout == f"{n + 1}\n", answer


def test_an_interrupt_that_its_run_never_took_never_hits_the_next_one(agent: Client) -> None:
    agent.run("import signal, time")
    for n in range(3):
        wait = "while signal.SIGINT not in signal.sigpending(): time.sleep(0.001)"
        assert (
            cancelled(agent, f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\nprint('go', flush=True)\n{wait}")
            == "ok"
        )
        answer = agent.run("signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])\nkept += 1\nprint(kept)")
        assert answer.stdout == f"{n + 1}\n", answer


def test_after_interrupts_that_cross_ends_a_run_can_still_be_interrupted(agent: Client) -> None:
    for _ in range(20):
        assert cancelled(agent, "print('go', flush=True)") in ("ok", "interrupted")
        assert cancelled(agent, "import time\nprint('go', flush=True)\ntime.sleep(100)") == "interrupted"
    assert agent.run("print(kept)").stdout == "0\n"


def test_a_context_that_is_restarted_or_removed_while_its_interrupt_settles_leaves_the_agent_well(agent: Client) -> None:
    for n in range(60):
        stream = agent.open("context.run", code="print('go', flush=True)")
        agent.wait_output(stream, b"go")
        agent.send(stream, wire.CANCEL)
        if n % 2:
            agent.finish(stream)  # else it goes in the middle
        agent.ok("context.restart" if n % 3 else "context.remove", id="python")
    assert agent.run("print('well')").stdout == "well\n"


def test_a_cancelled_run_in_a_large_library_keeps_the_state(agent: Client) -> None:
    large = "".join(f"def f{n}(a, b=1): return [a + b for _ in range(b)]\n" for n in range(BIG))
    (agent.home / "large.py").write_text(f"{large}import time\ndef wait():\n    print('go', flush=True)\n    time.sleep(100)\n")
    assert cancelled(agent, "import large\nlarge.wait()") == "interrupted"
    assert agent.run("print(kept)").stdout == "0\n"


def test_what_user_code_blocked_is_settled_too(session: Session) -> None:
    session.run("import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})")
    os.kill(session.pid, signal.SIGINT)
    session.request({"verb": "settle"})
    assert session.run("2").main["text/plain"] == "2"
    assert session.run("print('go')\ntime.sleep(300)", interrupt_at="go").outcome == "interrupted"


def test_the_interrupt_of_a_checkpoint_is_no_run_s(session: Session) -> None:
    os.kill(session.pid, signal.SIGSTOP)
    session.stream += 1
    session.control.sendall(wire.encode_json(session.stream, wire.OPEN, {"verb": "checkpoint"}))
    os.kill(session.pid, signal.SIGINT)
    os.kill(session.pid, signal.SIGCONT)
    twin = session.adopted(session.answer())
    live = twin.fork("wake")
    assert live.run("3").main["text/plain"] == "3"
    assert session.run("4").main["text/plain"] == "4"
    live.close()
    twin.close()
