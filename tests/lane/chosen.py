"""A plugin of the guest's pytest (-p lane.chosen): of the tests that it is given, those that are about this machine."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

# Other tiers and transports: the contract's parameter `where`. They make no cgroup, or the same ones at twice the price.
_OTHER_TIERS = ("fake", "http")
# What an emulated processor, thirteen times slower than this one, does not get done in its time; that time.
UNFIT: Mapping[str, str] = {
    "test_a_list_too_long_to_parse_cheaply_is_left_out_as_data_and_the_sandbox_lives": "30 s for a million numbers",
    "test_a_thread_bomb_is_stopped_at_the_pids_limit": "3 s",
    "test_anonymous_memory_is_stopped_at_the_memory_limit": "3 s",
    "test_a_zip_bomb_meets_the_limits_of_memory_and_disk": "3 s",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_other_tier(item) or getattr(item, "originalname", item.name) in UNFIT]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_other_tier(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return params.get("where") in _OTHER_TIERS
