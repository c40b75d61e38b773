"""Warm sandboxes, made before they are asked for: how many (`plan`), when not to (`breaker`), and the making (`warm`)."""

from fumehood.pool.plan import PoolSettings
from fumehood.pool.warm import Pool

__all__ = ["Pool", "PoolSettings"]
