"""A plugin of the guest's pytest (-p lane.chosen): of the tests that it is given, those that are about this machine."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

# Other tiers and transports: the contract's parameter `where`. They make no cgroup, or the same ones at twice the price.
_OTHER_TIERS = ("fake", "http")
# What an emulated processor, thirteen times slower than this one, can't show, by the test's name.
UNFIT: Mapping[str, str] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if _is_other_tier(item) or getattr(item, "originalname", item.name) in UNFIT]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_other_tier(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return params.get("where") in _OTHER_TIERS
