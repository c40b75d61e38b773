"""What a guest says whose PID 1 was taken over, and what its user alone can say: bounded, and about nobody else (H16)."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from collections.abc import Iterator
from typing import Any

import hostile
import pytest
from hostile import LIMITS, PRELUDE

from fumehood import Sandbox
from fumehood.agent import wire
from fumehood.cli.exits import complain
from fumehood.client.engine import Engine
from fumehood.errors import SandboxGone

pytestmark = [pytest.mark.microvm, pytest.mark.root]


@pytest.fixture(scope="module", params=hostile.TIERS)
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, Engine]]:
    with hostile.engine(request, request.param) as engine:
        yield request.param, engine


@pytest.fixture(scope="module")
def box(engine: tuple[str, Engine]) -> Iterator[Sandbox]:
    with Sandbox(tier=engine[0], url="", limits=LIMITS) as sandbox:
        yield sandbox


def saying(box: Sandbox, *values: tuple[int, dict[str, Any]]) -> Any:
    """The result of a run for which the guest's PID 1, if it were taken over, would say this."""
    link = box.live.link

    def say(_: str) -> None:
        if not link._streams:  # said already: a line may come in two pieces
            return
        data = b"".join(wire.encode_json(max(link._streams), kind, value) for kind, value in values)
        Engine.of_this_process().loop.call_soon_threadsafe(link._reader.feed_data, data)

    return box.run("import time; print('begun', flush=True); time.sleep(1)", on_stdout=say)


ACCOUNTS: dict[str, dict[str, Any]] = {
    "negative": {"oom_kills": -1, "pids_refused": -9, "pids_peak": -1, "pids": -1, "disk_used_bytes": -1},
    "of other kinds": {"oom_kills": True, "pids_refused": 1.5, "pids_peak": "9", "pids": [1], "disk_full": "yes"},
    "too large": {"oom_kills": 1 << 63, "pids_refused": 1 << 70, "pids_peak": 10**400, "pids": 1 << 62},
    "odd": {
        "disk_full": 1,
        "oom_kills": None,
        "\x1b]0;x\x07": "\0",
        "usage": {"cpu_s": -1},
        "status": "oom",
        "memory_bytes": 1,
    },
}


@pytest.mark.parametrize("account", ACCOUNTS.values(), ids=list(ACCOUNTS))
def test_an_account_that_makes_no_sense_counts_for_nothing(account: dict[str, Any], box: Sandbox) -> None:
    """H16: and no figure of the host's is among those that a guest may tell."""
    end = {"ok": {"exit_code": 0, "usage": {"cpu_s": 1e9}, "status": "oom", "context": 5}}
    result = saying(box, (wire.EVENT, {"type": "account", **account}), (wire.END, end))
    assert result.status == "ok" and result.usage.peak_pids == 0 and 0 < result.usage.cpu_s < 1e6, result
    stats = box.live.handle.stats()
    assert (stats.pids, stats.oom_kills, stats.pids_refused, box.live.handle.disk_used_bytes()) == (0, 0, 0, 0)  # pyright: ignore


def test_a_result_has_a_name_where_names_are_whatever_a_guest_says(box: Sandbox) -> None:
    """H16: results are kept, and shown to others than their author."""
    for odd in ({"a": [1]}, "x" * 100_000):
        result = saying(box, (wire.END, {"ok": {"exit_code": 0, "context": odd}}))
        assert result.context is None or (isinstance(result.context, str) and len(result.context) < 1000)


def test_a_guest_that_makes_up_accounts_does_not_make_the_host_grow(box: Sandbox) -> None:
    """H15, H16"""
    tracemalloc.start()
    try:
        for n in range(200):
            box.live.handle.told({f"{n}-{m}": "x" * 100 for m in range(500)})
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()


def test_frames_that_are_none_cost_the_guest_its_sandbox_and_the_host_nothing(engine: tuple[str, Engine]) -> None:
    with Sandbox(tier=engine[0], url="", limits=LIMITS) as box:
        result = saying(box, (wire.HELLO, {}))
        assert result.status == "killed" and "protocol" in result.cause, result
        with pytest.raises(SandboxGone):
            box.run("1")


def test_nothing_that_user_code_does_is_said_on_the_console(box: Sandbox) -> None:
    """H16: which the host quotes when a machine dies. Names with escapes, crashes, and every terminal that it could open."""
    before = box.live.handle.machine._monitor.said()
    code = """
name = b'\\x1b]0;evil\\x07'
_libc.prctl(15, name, 0, 0, 0)  # PR_SET_NAME
for path in ('/dev/console', '/dev/ttyS0', '/dev/tty', '/dev/kmsg', '/proc/kmsg', '/dev/hvc0', '/dev/vport1p1'):
    attempt(write, path, 'evil')
if (pid := os.fork()) == 0: ctypes.string_at(0)
print(os.waitpid(pid, 0)[1])
"""
    result = box.run(PRELUDE + code)
    assert (
        set(result.stdout.split()[:-1]) <= {"ENOENT", "ENXIO", "EROFS", "EACCES", "EPERM"} and result.stdout.split()[-1] == "11"
    )
    assert box.live.handle.machine._monitor.said() == before and "evil" not in before


def test_a_consoles_last_words_are_harmless_on_a_terminal() -> None:
    """H16: a panic quotes the name of the process that was running, which user code chose."""
    master, slave = os.openpty()
    with os.fdopen(master, "rb", 0) as shown, os.fdopen(slave, "w") as terminal, contextlib.redirect_stderr(terminal):
        complain("the machine ended", "Comm: \x1b]0;evil\x07 Not tainted")
        said = shown.read(1000)
    assert b"evil" in said and b"\x1b" not in said and b"\x07" not in said
