"""A copy for forks is not begun on a disk that has no room for it: a full one stops more than microVMs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fumehood.config import Config
from fumehood.errors import CapacityExceeded
from fumehood.runtime.microvm.copies import Copies
from fumehood.runtime.microvm.origin import Origin
from fumehood.runtime.microvm.places import Places
from http_server import clean_env

pytestmark = pytest.mark.rootless


async def test_forks_are_refused_before_the_disk_is_full() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        config = replace(Config.load(clean_env()), state_dir=Path(home), run_dir=Path(home))
        places = Places(config)
        try:
            origin = Origin(Path(home), {"memory_bytes": 1 << 60}, cast(Any, None))
            with pytest.raises(CapacityExceeded, match="not enough space"):
                async with Copies(config, places, "qemu").passing(cast(Any, None), origin, paused=False):
                    raise AssertionError("it was begun")
            assert not list(places.directory.iterdir())
        finally:
            places.aclose()
