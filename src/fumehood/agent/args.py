"""The arguments of an OPEN frame: the host's, and checked like anybody's."""

from __future__ import annotations

from typing import Any, cast

from . import files
from .loop import Refused

LIMITS = ("memory_bytes", "pids", "disk_bytes", "inodes", "open_files")
RULES = ("writable", "read_only", "hidden")
_ABSENT: Any = object()


class Args:
    """The arguments of an OPEN, checked one by one. Raises Refused("invalid")."""

    def __init__(self, value: dict[str, Any], home: str) -> None:
        self._value, self._home = value, home

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = _ABSENT) -> Any:
        value = self._value.get(name, default)
        if value is _ABSENT:
            raise Refused("invalid", f"{self._value.get('verb')} needs {name!r}")
        if value is not default and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise Refused("invalid", f"{name!r} must be {_spell(kind)}, not {value!r:.40}")
        return value

    def path(self, name: str, default: Any = _ABSENT) -> str:
        return files.resolve(self.get(name, str, default), self._home)

    def env(self) -> dict[str, str]:
        env = self.get("env", dict, {})
        if any(not isinstance(part, str) or "\0" in part for pair in env.items() for part in pair):
            raise Refused("invalid", "'env' must map strings to strings, without NUL")
        if any("=" in name or not name for name in env):
            raise Refused("invalid", "a name in 'env' is empty or has a '=' in it")
        return env

    def argv(self) -> list[str]:
        argv = self.get("argv", list)
        if not argv or any(not isinstance(word, str) for word in argv):
            raise Refused("invalid", "'argv' must be a list of strings, at least one")
        return argv

    def size(self) -> tuple[int, int]:
        rows, cols = self.get("rows", int), self.get("cols", int)
        if not (0 < rows < 1 << 16 and 0 < cols < 1 << 16):
            raise Refused("invalid", "'rows' and 'cols' must be from 1 to 65535")
        return rows, cols

    def pty(self) -> tuple[int, int] | None:
        size = self.get("pty", dict, None)
        return None if size is None else Args({"verb": "pty", **size}, self._home).size()

    def limits(self) -> dict[str, int]:
        limits = self.get("limits", dict, {})
        if any(name not in LIMITS or type(value) is not int or value <= 0 for name, value in limits.items()):
            raise Refused("invalid", f"'limits' must map {', '.join(LIMITS)} to positive integers")
        return limits

    def rules(self) -> dict[str, list[str]]:
        rules = self.get("files", dict, {})
        for name, paths in rules.items():
            absolute = isinstance(paths, list) and all(str(path)[:1] == "/" for path in cast("list[object]", paths))
            if name not in RULES or not absolute:
                raise Refused("invalid", f"'files' must map {', '.join(RULES)} to lists of absolute paths")
        return rules

    def natural(self, name: str, default: Any) -> int | None:
        value = self.get(name, int, default)
        if value is not None and not 0 <= value < 1 << 63:
            raise Refused("invalid", f"{name!r} must not be negative")
        return value


def _spell(kind: type | tuple[type, ...]) -> str:
    return " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
