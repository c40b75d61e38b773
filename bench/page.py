"""docs/benchmarks.md and its chart, from one run's JSON and from nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SERVICE, MICROVM = "## The service under load", "## MicroVMs"
_PARTS = ("# Benchmarks", SERVICE, MICROVM)  # each written by another run
_SNIPPETS = {"print": "print(1)", "pandas": "pandas describe()"}


def write(report: dict[str, Any], data: Path, page: Path) -> None:
    """The chart goes beside `data`, the run's JSON; `page` refers to both."""
    picture = data.with_suffix(".svg")
    _chart(report, picture)
    where = {name: os.path.relpath(path, page.parent) for name, path in (("data", data), ("picture", picture))}
    put(page, _PARTS[0], "\n".join(_lines(report, where)))


def put(page: Path, head: str, text: str) -> None:
    """Replaces the part of `page` that begins with `head`, or adds it where it belongs."""
    parts, current = dict[str, list[str]](), _PARTS[0]
    for line in page.read_text().splitlines() if page.exists() else ():
        current = line if line in _PARTS else current
        parts.setdefault(current, []).append(line)
    parts[head] = [head, *text.splitlines()]
    page.write_text("\n\n".join("\n".join(parts[name]).strip() for name in _PARTS if name in parts) + "\n")


def _lines(report: dict[str, Any], where: dict[str, str]) -> Iterator[str]:
    machine = report["machine"]
    yield "\nWritten by `make bench`; do not edit. Every figure is of one run on one machine, peers included:"
    yield f"{machine['cpus']} × {machine['cpu']}, {machine['memory_mib'] / 1024:.0f} GiB, Linux {machine['kernel']},"
    yield f"cgroup {machine['cgroup']}, Python {machine['python']}, {'root' if machine['uid'] == 0 else 'an ordinary user'},"
    yield f"{report['date']}. Raw data: [{Path(where['data']).name}]({where['data']})."
    if report["contended"]:
        yield f"\n**Taken on a busy machine, so worse than its own figures:** {report['contended']} before it"
        yield f"began ({report['load_1m_at_end']:g} when it ended, its own part included)."
    yield f"\n![start and run times]({where['picture']})"
    yield "\n## Targets\n\n| target | limit | measured | |\n|---|---:|---:|---|"
    yield from map(verdict, report["targets"])
    yield "\n## One snippet, start to end\n"
    yield "Wall time in milliseconds of the successes (answers are checked), by nearest rank; `×`: p50 beside plain Python's."
    for snippet, title in _SNIPPETS.items():
        yield f"\n### `{title}`\n\n| | | ok | p50 | p95 | p99 | × |\n|---|---|---:|---:|---:|---:|---:|"
        yield from _table([r for r in report["rows"] if r["snippet"] == snippet])
    for name, why in report["absent"].items():
        yield f"\n`{name}` is absent: {' '.join(why.split())}"
    yield from _notes(report)


def verdict(row: dict[str, Any]) -> str:
    sign, unit = "≥" if row["at_least"] else "≤", row["unit"]
    limit = f"{sign} {row['limit']:g} {unit}"
    if row["value"] is None:
        return f"| {row['what']} | {limit} | | not measured |"
    missed = "**missed**" if row["miss"] is None else f"**missed, {row['miss']:g}× off**"
    return f"| {row['what']} | {limit} | {row['value']:g} {unit} | {'met' if row['met'] else missed} |"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    base = next((r.get("p50_ms") for r in rows if r["name"] == "python"), None)
    for row in rows:
        figures = [f"{row[p]:.1f}" if p in row else "" for p in ("p50_ms", "p95_ms", "p99_ms")]
        times = f"{row['p50_ms'] / base:.2f}" if base and "p50_ms" in row else ""
        yield f"| {row['name']} | {row['what']} | {row['ok']}/{row['attempts']} | {' | '.join(figures)} | {times} |"


def _notes(report: dict[str, Any]) -> Iterator[str]:
    yield "\nThe peers run with as little as they can: no seccomp filter, no limits. fumehood's rows have all its protections."
    if s := report.get("sustained"):
        yield "\n## Sustained\n"
        yield f"{s['callers']} callers for {s['seconds']:g} s: {s['ok']}/{s['attempts']} ok, **{s['per_s']:g}/s**;"
        if s["ok"]:
            yield f"each p50 {s['p50_ms']:.1f}, p95 {s['p95_ms']:.1f}, p99 {s['p99_ms']:.1f} ms."
        yield "\n| held by supervisor, zygotes, host | before | after |\n|---|---:|---:|"
        yield from (f"| {k} | {s['before'][k]:g} | {s['after'][k]:g} |" for k in s["before"])
        yield f"\nLeaks: {'; '.join(s['leaks']) or 'none'}."
    if report.get("idle"):
        yield "\n## Idle sandboxes\n"
        yield "| sandboxes | PSS each, MiB | host memory each, MiB | made in, s | ended in, s |"
        yield "|---:|---:|---:|---:|---:|"
        yield from map(_idle, report["idle"])
        yield "\nPSS divides each shared page by its sharers, so one sandbox alone pays for most of the imports. Host memory"
        yield "is what `MemAvailable` lost: it has the kernel's part (namespaces, cgroups, page tables) too."


def _idle(row: dict[str, Any]) -> str:
    count = f"{row['made']}" + (f" of {row['sandboxes']}: {row['failure']}" if "failure" in row else "")
    host = f"{row['host_mib']:g}" if row["made"] >= 100 else "lost in the host's own noise"
    return f"| {count} | {row['pss_mib']:g} | {host} | {row['made_in_s']:g} | {row['ended_in_s']:g} |"


def _chart(report: dict[str, Any], picture: Path) -> None:
    """p50 as bars with a whisker to p99, on a logarithmic axis: the rows differ a thousandfold."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    # A fixed salt and no date: the same data gives the same file, so a diff shows figures only.
    plt.rcParams.update({"svg.hashsalt": "fumehood", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained", sharex=True, sharey=True)
    for axis, (snippet, title) in zip(axes, _SNIPPETS.items(), strict=True):
        rows = [r for r in report["rows"] if r["snippet"] == snippet and "p50_ms" in r]
        p50, p99 = [r["p50_ms"] for r in rows], [r["p99_ms"] for r in rows]
        colours = ["#2a6f97" if r["name"].startswith("fumehood") else "#adb5bd" for r in rows]
        whiskers = [[0.0] * len(rows), [b - a for a, b in zip(p50, p99, strict=True)]]
        axis.barh([r["name"] for r in rows], p50, color=colours, xerr=whiskers, error_kw={"ecolor": "#495057", "lw": 1})
        for at, (ms, far) in enumerate(zip(p50, p99, strict=True)):
            axis.text(far * 1.15, at, f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}", va="center")
        axis.set(xscale="log", xlabel="ms, log scale: bar to p50, whisker to p99", title=title)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[0].set_xlim(left=0.5, right=max([r["p99_ms"] for r in report["rows"] if "p99_ms" in r], default=1000.0) * 3)
    figure.savefig(picture, metadata={"Date": None})  # pyright: ignore[reportUnknownMemberType]
    plt.close(figure)
