"""The tiers of this build and how each is made, on first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fumehood.config import Config
from fumehood.runtime.base import Runtime


def _native(config: Config) -> Runtime:
    from fumehood.runtime.native.driver import NativeRuntime

    return NativeRuntime(config)


def _fake(config: Config) -> Runtime:
    from fumehood.runtime.fake import FakeRuntime

    return FakeRuntime(config)


# The strongest first: `auto` takes it. `fake` isolates nothing and is there to be asked for by name only.
TIERS: Mapping[str, Callable[[Config], Runtime]] = {"native": _native, "fake": _fake}
