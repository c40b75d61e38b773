"""The promises, each measured against the figure of this run. Met or not, every one is published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.figures import against


class Target(NamedTuple):
    what: str
    unit: str
    limit: float
    at_least: bool
    value: Callable[[dict[str, Any]], float]


def _row(report: dict[str, Any], name: str, snippet: str) -> dict[str, Any]:
    return next(r for r in report["rows"] if (r["name"], r["snippet"]) == (name, snippet))


def _idle(report: dict[str, Any], sandboxes: int) -> dict[str, Any]:
    return next(m for m in report["idle"] if m["sandboxes"] == sandboxes == m["made"])


_ZYGOTE, _COLD, _SESSION = "fumehood zygote", "fumehood cold", "fumehood session"


def _p(name: str, percentile: str) -> Callable[[dict[str, Any]], float]:
    return lambda report: _row(report, name, "print")[percentile]


def _over(report: dict[str, Any]) -> float:
    return _row(report, _SESSION, "print")["parts"]["over"]["p50_ms"]


def _failed(report: dict[str, Any]) -> float:
    return report["sustained"]["attempts"] - report["sustained"]["ok"]


def _leaked(report: dict[str, Any]) -> float:
    return len(report["sustained"]["leaks"])


def _idle_500(report: dict[str, Any]) -> float:
    return _idle(report, 500)["pss_mib"]


def _part(part: str, figure: str) -> Callable[[dict[str, Any]], float]:
    return lambda report: report[part][figure]


TARGETS = (
    Target("create, first result, destroy from a warm zygote, p50", "ms", 10, False, _p(_ZYGOTE, "p50_ms")),
    Target("the same, p99", "ms", 40, False, _p(_ZYGOTE, "p99_ms")),
    Target("a run in a live session over the code's own time, p50", "ms", 1, False, _over),
    Target("created, run, destroyed per second, sustained", "/s", 100, True, _part("sustained", "per_s")),
    Target("kinds of thing that this leaked", "", 0, False, _leaked),
    Target("failures in it", "", 0, False, _failed),
    Target("PSS of each of 500 idle sandboxes", "MiB", 4, False, _idle_500),
    Target("`fumehood run -c 'print(1)'`, p50", "ms", 600, False, _p(_COLD, "p50_ms")),
    Target("host memory growth while 1 GiB is printed", "MiB", 64, False, _part("flood", "grew_mib")),
    Target("host memory growth while a 1 TB sparse file is read", "MiB", 64, False, _part("sparse", "grew_mib")),
)


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    return judge(TARGETS, report)


def judge(targets: Sequence[Target], report: dict[str, Any]) -> list[dict[str, Any]]:
    """One verdict for each target; `value` is None where this run did not measure it."""
    found: list[dict[str, Any]] = []
    for target in targets:
        head: dict[str, Any] = {"what": target.what, "unit": target.unit, "limit": target.limit, "at_least": target.at_least}
        try:
            found.append(head | against(target.value(report), target.limit, target.at_least))
        except (KeyError, StopIteration):  # --only, a subject that is absent, or one that never succeeded
            found.append(head | {"value": None, "met": None, "miss": None})
    return found
