"""The order of one load run: latency on a quiet server, the peer, then mixed load, a burst and a crowd on another server."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.__main__ import ROOT, keep, opened, say
from bench.load import bursts, latency, mixed, page, peer
from bench.load.server import Server, broken
from bench.load.targets import verdicts

QUIET, BUSY = ("ceiling", "sessions", "claims"), ("mixed", "burst", "crowd")
PARTS = (*QUIET, "peer", *BUSY)


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if (report := opened(options.force)) is None:
        return 3
    report["seconds"] = options.seconds
    with tempfile.TemporaryDirectory(prefix="fumehood-load-") as work:
        report |= _measure(Path(work), options)
    report["targets"] = verdicts(report)
    data = keep(report, options.out, "-load")
    if not options.only:  # a part of the table is no table
        page.write(report, data, ROOT / "docs/benchmarks.md")
        say("wrote docs/benchmarks.md")
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="of mixed load")
    parser.add_argument("--per-s", type=float, default=50.0, help="executions of the mixed load")
    parser.add_argument("--claims-per-s", type=float, default=20.0, help="one-shot runs whose latency is measured")
    parser.add_argument("--samples", type=int, default=800, help="of each latency")
    parser.add_argument("--requests", type=int, default=500, help="in the burst")
    parser.add_argument("--sessions", type=int, default=200, help="in the crowd")
    parser.add_argument("--pool-idle-s", type=float, default=30.0, help="the server's setting; short, it is calm again sooner")
    parser.add_argument("--only", action="append", default=[], choices=PARTS, help="a part; writes no page")
    parser.add_argument("--force", action="store_true", help="measure a busy machine; the result says that it was")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="where the JSON goes")
    return parser.parse_args(argv)


def _measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    wanted = set(options.only or PARTS)
    parts: dict[str, Callable[[Server], Any]] = {
        "ceiling": latency.ceiling,
        "sessions": lambda s: latency.sessions(s, options.samples),
        "claims": lambda s: latency.claims(s, options.samples, options.claims_per_s),
        "mixed": lambda s: mixed.measure(s, options.seconds, options.per_s),
        "burst": lambda s: bursts.burst(s, options.requests),
        "crowd": lambda s: bursts.crowd(s, options.sessions),
    }
    report: dict[str, Any] = {}
    for names in (QUIET, BUSY):
        if chosen := [name for name in names if name in wanted]:
            server = Server(work / names[0], pool_idle_s=options.pool_idle_s)
            report |= _on_a_server(server, {name: parts[name] for name in chosen})
        if names is QUIET and "peer" in wanted:
            say("peer")
            report["peer"] = _peer(work, options.samples)
    return report


def _on_a_server(server: Server, parts: dict[str, Callable[[Server], Any]]) -> dict[str, Any]:
    """Each part in turn; the server's end is a part of what is measured."""
    report = dict[str, Any]()
    server.start()
    try:
        for name, part in parts.items():
            say(name)
            report[name] = part(server)
    finally:
        code, text = server.stop(), server.tail(1 << 30)
        say(f"the server ended with {code}")
        if broken(text):
            say(f"its log has failures: {text[-3000:]}")
    return report | {f"server_{'_'.join(parts)}": {"exit_code": code, "broken": broken(text)}}


def _peer(work: Path, samples: int) -> dict[str, Any] | str:
    where = work / "peer"
    where.mkdir()
    try:
        return peer.measure(where, min(48, samples // 8), samples)
    except peer.NoPeer as e:
        return str(e)


if __name__ == "__main__":
    sys.exit(main())
