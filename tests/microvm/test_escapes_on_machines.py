"""The attempts of `fumehood demo escape` in a machine: those that mean the same there, and where the others are instead."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from hostile import LIMITS

from fumehood import AsyncSandbox
from fumehood.cli import escape
from fumehood.client.calls import block_on
from fumehood.client.engine import Engine
from fumehood.demo import host as hosts
from fumehood.demo.escapes import ATTEMPTS, Attempt, program

pytestmark = [pytest.mark.microvm, pytest.mark.root]
_GUESTS = "a door of the guest's kernel, which is there to be attacked in the host's place"
_BOMB = "test_limits_on_machines.py has one that fits a machine"
# The demo's attempts that mean something else in a machine, and why.
ELSEWHERE = {
    "vsock_socket": "test_security_on_machines.py: test_no_socket_leads_out: it may have one, and nobody answers",
    "netlink_socket": _GUESTS,
    "every_other_family": _GUESTS,
    "int80_socket": "test_the_32_bit_entry_is_closed_but...: on a pvm host it ends by another signal",
    "int80_mount": "the same",
    "started_before_the_filter": "test_planted_code_runs_as_the_user_only: user code has no filter",
    "raw_address": "test_no_socket_leads_out: the guest has no IPv6, where this one ends with an error",
    "metadata_service": "the same",
    "host_addresses": "the same",
    "memory_scan": "test_clones_on_machines.py: test_a_golden_snapshot_holds_no_word_of_the_host",
    "kernel_memory": "what /proc shows is the guest's",
    "sysfs": "what /sys shows is the guest's; test_all_that_can_be_written looks for what can be changed there",
    "unshare_user": "test_no_namespace_of_users_is_had: the refusal has another name",
    "clone_user": "the same",
    "clone3_user": "the same",
    "setns_of_init": "test_no_call_reaches_pid_1: joining its own namespace is no way out",
    "type_into_terminal": "the only terminals are those it made itself",
    "no_privilege_left": "test_user_code_is_an_ordinary_user: all but the filter, which it does not have",
    "endless_loop": _BOMB,
    **dict.fromkeys(("fork_bomb", "thread_bomb", "memory_anonymous", "memory_tmpfs", "memory_memfd", "memory_pipes"), _BOMB),
    **dict.fromkeys(("descriptors", "inodes", "output_flood"), _BOMB),
}
# What a distribution's kernel has and our own leave out, with the words of each such door: it is the guest's (SECURITY.md).
IN_STOCK = {
    "io_uring": "io_uring_setup: ok",
    "userfaultfd": "(USER_MODE_ONLY): ok",
    "keyrings": "key",
    "host_facts": "processes visible",
}
FATAL = {"stop_init", "forge_frames"}  # may cost their sandbox
TRIED = [a for a in ATTEMPTS if a.key not in ELSEWHERE]


@pytest.fixture(scope="module")
def host(tier: str) -> Iterator[hosts.Host]:
    engine, stack = Engine.of_this_process(), contextlib.AsyncExitStack()
    yield block_on(engine, stack.enter_async_context(hosts.watched()))
    block_on(engine, stack.aclose())


@pytest.fixture(scope="module")
def tried(tier: str) -> Iterator[AsyncSandbox]:
    sandbox = AsyncSandbox(tier=tier, url="", limits=LIMITS)
    asyncio.run(sandbox.open())  # it lives in the engine's loop
    yield sandbox
    asyncio.run(sandbox.close())


def test_each_attempt_of_the_demo_is_tried_here_or_named_with_its_reason() -> None:
    assert set(ELSEWHERE) < {a.key for a in ATTEMPTS} and len(TRIED) >= 35
    assert {a.key for a in TRIED} > set(IN_STOCK)


@pytest.mark.parametrize("attempt", TRIED, ids=lambda a: f"{a.hazard}-{a.name}")
async def test_an_attempt_to_escape_is_contained(
    attempt: Attempt, tier: str, guest_kernel: str, host: hosts.Host, tried: AsyncSandbox
) -> None:
    """H4-H25, as in `fumehood demo escape`, by the same judge."""
    door = IN_STOCK.get(attempt.key) if guest_kernel == "stock" else None
    async with contextlib.AsyncExitStack() as stack:
        alone = attempt.key in FATAL or attempt.plant is not None
        own = await stack.enter_async_context(AsyncSandbox(tier=tier, url="", limits=LIMITS)) if alone else tried
        if attempt.plant:
            await own.run(program(attempt.plant, host.public))
        where = own if attempt.key in FATAL else tried
        result = await where.run(program(attempt.probe, host.public))
        seen = await escape._CHECKS[attempt.check](where, host) if attempt.check in ("download", "copy_out") else []
        found = escape.verdict(attempt, result, host, seen)
        assert found.outcome == ("BREACH" if door else "contained"), found
        assert not door or all(line.startswith("BREACH ") and door in line for line in found.evidence), found
        assert not alone or (await tried.run("6 * 7")).text == "42", "of its neighbour"
