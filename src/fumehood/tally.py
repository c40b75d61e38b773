"""What the host saw refused in one sandbox, counted. Nothing that the guest says is in it (H16)."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fumehood.events import EgressDenied, Event, SyscallRefused
from fumehood.model import ConnectionAttempt, RefusedSyscall

_MAX_DISTINCT = 1_000  # different refused calls or addresses remembered for each sandbox


class Tally:
    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str]] = Counter()
        self._attempts: Counter[ConnectionAttempt] = Counter()

    def note(self, event: Event) -> None:
        match event:
            case SyscallRefused():
                _add(self._calls, (event.name, event.arch))
            case EgressDenied():
                _add(self._attempts, event.attempt)
            case _:
                pass

    def copy(self) -> Tally:
        """As it is at this moment, for `since`."""
        tally = Tally()
        tally._calls, tally._attempts = self._calls.copy(), self._attempts.copy()
        return tally

    def since(self, before: Tally) -> tuple[tuple[RefusedSyscall, ...], tuple[ConnectionAttempt, ...]]:
        calls, attempts = self._calls - before._calls, self._attempts - before._attempts
        return (
            tuple(RefusedSyscall(name, n, arch) for (name, arch), n in calls.most_common()),
            tuple(ConnectionAttempt(a.address, a.port, a.protocol, a.allowed, n) for a, n in attempts.items()),
        )


def _add(counter: Counter[Any], key: Any) -> None:
    if key in counter or len(counter) < _MAX_DISTINCT:
        counter[key] += 1
