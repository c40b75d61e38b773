"""The service's figures as Prometheus reads them. Taken from what the service counts anyway, at the moment of the question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fumehood.service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST


def exposition(service: Service, answers: Counter[int]) -> bytes:
    """No label holds what a caller wrote or who it was: tenants can't see each other here either."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(service, answers))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, service: Service, answers: Counter[int]) -> None:
        self._service, self._answers = service, answers

    def collect(self) -> Iterator[Metric]:
        status = self._service.status()
        for name in ("uptime_s", "sandboxes", "paused", "executions"):
            yield GaugeMetricFamily(f"fumehood_{name}", f"{name} now", value=float(status[name]))
        yield _counter("executions_done", "by status", "status", {s: n for s, n in self._service.counts.items()})
        yield _counter("answers", "by HTTP status", "code", {str(s): n for s, n in self._answers.items()})
        yield _counter(
            "records_lost", "writes of the store that nobody waited for and that failed", "", {"": status["records_lost"]}
        )
        for queue, found in status["scheduler"].items():
            yield GaugeMetricFamily(
                f"fumehood_{queue}_waiting", f"requests that wait for {queue}", value=sum(found["waiting"].values())
            )
            yield GaugeMetricFamily(f"fumehood_{queue}_held", f"{queue} held", value=found["held_total"]["places"])
            yield GaugeMetricFamily(f"fumehood_{queue}", f"{queue} there are", value=found["capacity"]["places"])
        for name in ("warm", "making", "target"):
            gauge = GaugeMetricFamily(f"fumehood_pool_{name}", f"warm sandboxes: {name}", labels=["class"])
            for row in status["pools"]:
                gauge.add_metric([row["class"]], row[name])
            yield gauge
        for name in ("hits", "misses", "made", "failed", "reclaimed"):
            totals = Counter[str]()
            for row in status["pools"]:
                totals[row["class"]] += row[name]
            yield _counter(f"pool_{name}", f"warm pool: {name}", "class", totals)


def _counter(name: str, words: str, label: str, values: dict[str, int] | Counter[str]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"fumehood_{name}", words, labels=[label] if label else [])
    for value, count in values.items():
        family.add_metric([value] if label else [], count)
    return family
