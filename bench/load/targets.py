"""The promises of the service, each against this run's figure. Met or not, every one is published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.targets import Target, judge


def _of(*path: str) -> Callable[[dict[str, Any]], float]:
    def value(report: dict[str, Any]) -> float:
        found: Any = report
        for key in path:
            found = found[key]
        return found if isinstance(found, int | float) else len(found)

    return value


def _short(part: str, asked: str, got: str) -> Callable[[dict[str, Any]], float]:
    return lambda report: report[part][asked] - report[part][got]


def _unclean(report: dict[str, Any]) -> float:
    row = report["burst"]
    return row["lost"] + row["unexpected"] + row["wrong_owner"]


TARGETS = (
    Target("one-shot run over HTTP from the warm pool, 8 callers, p50", "ms", 8, False, _of("claims", "spread", "p50_ms")),
    Target("the same, p99", "ms", 40, False, _of("claims", "spread", "p99_ms")),
    Target("run in a live session over HTTP, p50", "ms", 3, False, _of("sessions", "alone", "p50_ms")),
    Target("the same through the SDK, p50", "ms", 3, False, _of("sessions", "sdk", "p50_ms")),
    Target("mixed load: executions of all kinds per second", "/s", 50, True, _of("mixed", "executions_asked_per_s")),
    Target("requests lost", "", 0, False, _of("mixed", "lost")),
    Target("answers to somebody else's request", "", 0, False, _of("mixed", "wrong_owner")),
    Target("executions with no record, or more than one", "", 0, False, _of("mixed", "records_wrong")),
    Target("kinds of thing that were left", "", 0, False, _of("mixed", "leaks")),
    Target("sessions alive together", "", 200, True, _of("crowd", "alive")),
    Target("of them without their own state", "", 0, False, _short("crowd", "made", "own_state")),
    Target("burst: requests without a result or a clean 429", "", 0, False, _unclean),
)


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    return judge(TARGETS, report)
