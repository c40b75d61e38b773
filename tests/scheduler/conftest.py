from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest
from waiters import ticks


@pytest.fixture
async def nothing_is_left_unheard() -> AsyncIterator[None]:
    """Fails when the loop logs anything: an exception that nobody retrieved, one in a callback, a task that was lost."""
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    yield
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await ticks(5)
    gc.collect()
    assert not said
