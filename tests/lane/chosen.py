"""A plugin of the guest's pytest (-p lane.chosen): of the tests that it is given, those that are about this machine."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import pytest

# Other tiers and transports: the contract's parameter `where`. They make no cgroup, or the same ones at twice the price.
_OTHER_TIERS = ("fake", "http")
_SLOW = "too little time for a processor that is emulated, thirteen times slower than this one"
_DEAR = "ten seconds and more, for what has nothing to do with cgroups"
LEFT_OUT: Mapping[str, str] = {
    "test_a_deadline_ends_the_run_and_the_sandbox_lives": _SLOW,
    "test_a_thread_bomb_is_stopped_at_the_pids_limit": _SLOW,
    "test_a_zip_bomb_meets_the_limits_of_memory_and_disk": _SLOW,
    "test_an_output_flood_is_ended_and_named": _SLOW,
    "test_anonymous_memory_is_stopped_at_the_memory_limit": _SLOW,
    "test_a_read_only_bind_alone_stops_writes_through_it_and_remounts": _DEAR,
    "test_the_agent_can_be_neither_stopped_nor_killed_from_inside": _DEAR,
    "test_the_ipc_namespace_alone_separates_shared_memory": _DEAR,
    "test_the_network_namespace_alone_keeps_the_hosts_loopback_away": _DEAR,
    "test_the_network_namespace_also_separates_abstract_sockets": _DEAR,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_other_tier(item) or getattr(item, "originalname", item.name) in LEFT_OUT]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_other_tier(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return params.get("where") in _OTHER_TIERS


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is told at once: a machine that is cut off has no summary."""
    report = yield
    if report.failed:
        item.config.get_terminal_writer().line(f"\n{report.nodeid}: {report.longreprtext}")
    return report
