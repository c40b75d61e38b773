"""snapshot, snapshots, fork, rollback where the tier has no snapshots: said so in three lines, and nothing is lost."""

from __future__ import annotations

import json

import pytest
from served import Served

UNKNOWN = "p0123456789abcdef"


@pytest.mark.parametrize("verb", [("snapshot",), ("fork",), ("fork", "-n", "3"), ("rollback", UNKNOWN)])
def test_a_tier_without_snapshots_is_an_error_with_help(server: Served, box: str, verb: tuple[str, ...]) -> None:
    name, *rest = verb
    done = server.run(name, box, *rest)
    assert done.returncode == 125 and not done.stdout
    labels = [line.partition(": ")[0] for line in done.stderr.splitlines()]
    assert labels == ["error", "cause", "help"] and "native" in done.stderr and "qemu" in done.stderr
    said = json.loads(server.run(name, box, *rest, "--json").stdout)
    assert (said["error"]["code"], said["exit"]) == ("unsupported", 125)
    assert server.do("exec", box, "--", "echo", "alive") == "alive\n"


def test_there_are_none_to_list_or_to_forget(server: Served, box: str) -> None:
    assert server.do("snapshots") == server.do("snapshots", "--sandbox", box, "-q") == ""
    assert server.json("snapshots") == {"snapshots": []}
    done = server.run("snapshots", "rm", UNKNOWN, "never")
    assert done.returncode == 125 and done.stderr.count("error: ") == 2 and "Traceback" not in done.stderr
    assert set(json.loads(server.run("snapshots", "rm", UNKNOWN, "--json").stdout)["failed"]) == {UNKNOWN}


def test_wrong_words_are_wrong_usage(server: Served, box: str) -> None:
    wrong = [("fork", box, "-n", "0"), ("fork", box, "-n", "65"), ("fork", box, "-n", "x"), ("fork", box, "--lease", "soon")]
    wrong += [("snapshot", box, "--label", "novalue"), ("create", "--snapshot", "never"), ("snapshots", "--limit", "0")]
    wrong += [("create", "--snapshot", UNKNOWN, "--template", "python"), ("snapshots", "rm"), ("rollback", box), ("snapshot",)]
    for command in wrong:
        done = server.run(*command)
        assert done.returncode == 2 and done.stderr.startswith("error: "), (command, done)


def test_a_checkpoint_of_a_context_is_rolled_back_to(server: Served, box: str) -> None:
    done = server.run("rollback", box, "python:never")
    assert done.returncode == 125 and "checkpoint" in done.stderr, "it is asked of the sandbox, and known there to be none"


def test_of_a_sandbox_that_is_not_there_nothing_is_made(server: Served) -> None:
    for command in (("snapshot", "s0123456789abcdef"), ("fork", "../etc"), ("rollback", "s0123456789abcdef", UNKNOWN)):
        done = server.run(*command)
        assert done.returncode in (2, 125) and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert server.run("create", "--snapshot", UNKNOWN).returncode == 125
