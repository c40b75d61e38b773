"""The service's section of docs/benchmarks.md, from one run's JSON and from nothing else."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.page import SERVICE, put, verdict

_P = ("p50_ms", "p95_ms", "p99_ms")
_FATES = ("answered", "refused", "aborted", "unexpected", "lost")


def write(report: dict[str, Any], data: Path, page: Path) -> None:
    """Replaces the section, or adds it."""
    where = os.path.relpath(data, page.parent)
    put(page, SERVICE, "\n".join(_lines(report, f"[{data.name}]({where})")))


def _prose(*parts: str) -> str:
    return "\n" + textwrap.fill(" ".join(parts), 128, break_long_words=False, break_on_hyphens=False)


def _lines(report: dict[str, Any], link: str) -> Iterator[str]:
    machine, mixed, c = report["machine"], report["mixed"], report["ceiling"]
    yield _prose(
        f"Written by `python -m bench.load --seconds {report['seconds']:g}`; do not edit. A real `fumehood serve` with default",
        "settings and all protections, driven over HTTP on loopback by a process on the same processors:",
        f"{machine['cpus']} × {machine['cpu']}, {report['date']}. Raw data: {link}.",
    )
    if report["contended"]:
        yield _prose("**Taken on a busy machine, so worse than its own figures:**", report["contended"], "before it began.")
    yield _prose(
        f"The generator itself: {c['per_s']}/s against `/healthz`, p50 {c['p50_ms']:.2f} ms, {c['generator_cpu_us_each']:g} µs",
        f"of its own CPU for each request; in the mixed load it started work {mixed['generator']['late_ms']['p99']:g} ms late",
        "at p99.",
    )
    yield "\n### Service targets\n\n| target | limit | measured | |\n|---|---:|---:|---|"
    yield from map(verdict, report["targets"])
    yield "\n### One request\n\nMilliseconds; every answer is checked.\n"
    yield "| | | ok | p50 | p95 | p99 |\n|---|---|---:|---:|---:|---:|"
    yield from _ours(report["claims"], report["sessions"])
    yield from _peer(report["peer"])
    yield from _mixed(mixed)
    yield from _many(report["crowd"], report["burst"])


def _row(what: str, how: str, row: dict[str, Any]) -> str:
    figures = " | ".join(f"{row[p]:.1f}" if p in row else "" for p in _P)
    return f"| {what} | {how} | {row['ok']}/{row['attempts']} | {figures} |"


def _ours(claims: dict[str, Any], sessions: dict[str, Any]) -> Iterator[str]:
    rate, once, live = f"{claims['per_s']:g}/s", "fumehood, `POST /v1/run`", "fumehood, live session"
    spread, volleys, emptied = claims["spread"], claims["volleys"], claims["emptied"]
    yield _row(once, f"8 callers at random times, {rate}; {spread['hit_rate']:.1%} warm", spread)
    yield _row(once, f"8 in the same moment, {rate}; {volleys['hit_rate']:.1%} warm", volleys)
    mix = f"{emptied['hits']} warm, {emptied['misses']} cold"
    yield _row(once, f"{emptied['at_once']} in the same moment, so the pool runs empty: {mix}", emptied)
    yield _row(live, "one caller", sessions["alone"])
    yield _row(live, "8 callers without a pause, a session each", sessions["eight"])
    yield _row(live, "one caller through the SDK", sessions["sdk"])


def _peer(peer: dict[str, Any] | str) -> Iterator[str]:
    if isinstance(peer, str):
        yield _prose("The peer is absent:", peer)
        return
    name = str(peer["name"])
    yield _row(name, "kernel started, first result; one caller", peer["start_alone"])
    yield _row(name, "kernel started, first result; 8 callers without a pause", peer["start_eight"])
    yield _row(name, "live kernel; one caller", peer["run_alone"])
    yield _row(name, "live kernel; 8 callers without a pause, a kernel each", peer["run_eight"])
    yield _prose(
        f"{name} {peer['version']}: its kernels are processes of the server's own user; they see its files, its network and",
        "each other, and have no limits. fumehood's rows have namespaces, seccomp, Landlock, cgroups, a uid of their own, and",
        "a record of each execution on disk. The peer leaves Nagle's algorithm on; here its client acknowledges at once, else",
        "each of its runs takes 40 ms more.",
    )


def _mixed(mixed: dict[str, Any]) -> Iterator[str]:
    yield "\n### Mixed load"
    yield _prose(
        f"{mixed['asked_per_s']:g} executions/s for {mixed['seconds']:g} s by four tenants, at most",
        f"{mixed['generator']['at_once_most']} at once. {mixed['requests']} requests: {mixed['answered']} answered,",
        f"{mixed['refused']} refused cleanly, {mixed['aborted']} hung up on by the generator, {mixed['unexpected']} that ended",
        f"otherwise than their program should, **{mixed['lost']} lost, {mixed['wrong_owner']} with another's answer**;",
        f"{mixed['records']} records of executions, {mixed['records_wrong']} of them wrong.",
    )
    yield f"\n| | {' | '.join(_FATES)} | p50 | p95 | p99 |\n|---|{'---:|' * (len(_FATES) + 3)}"
    for kind, fates in mixed["by_kind"].items():
        times = mixed["times"].get(kind, {})
        cells = [str(fates.get(f, 0)) for f in _FATES] + [f"{times[p]:.1f}" if p in times else "" for p in _P]
        yield f"| {kind} | {' | '.join(cells)} |"
    rss = mixed["rss_mib"]
    yield _prose(
        f"The server's memory: {rss['first']:g} MiB when it began, {rss['most']:g} at most, {rss['last']:g} at its end."
    )
    yield f"\n| held by server, zygotes, host | before | {mixed['calm_s']:g} s after |\n|---|---:|---:|"
    yield from (f"| {k} | {v:g} | {mixed['after'][k]:g} |" for k, v in mixed["before"].items())
    yield f"\nLeaks: {'; '.join(mixed['leaks']) or 'none'}."


def _many(crowd: dict[str, Any], burst: dict[str, Any]) -> Iterator[str]:
    asked = crowd["all_asked_at_once"]
    bad = burst["lost"] + burst["unexpected"] + burst["wrong_owner"]
    yield "\n### Many at once"
    yield _prose(
        f"{crowd['made']} of {crowd['asked']} sessions made in {crowd['made_in_s']:g} s; {crowd['alive']} alive together,",
        f"{crowd['own_state']} answered with their own state when all were asked in the same moment",
        f"(p50 {asked['p50_ms']:.0f} ms, the last {asked['most_ms']:.0f} ms); {crowd['family_pss_mib_each']:g} MiB each,",
        f"the server {crowd['rss_mib']:g} MiB.",
    )
    yield _prose(
        f"{burst['requests']} one-shot runs in the same moment against a queue of 100: {burst['answered']} results,",
        f"{burst['refused']} clean refusals with Retry-After, {bad} anything else, all within {burst['seconds']:g} s.",
    )
