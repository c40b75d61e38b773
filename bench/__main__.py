"""The order of one run: judge the machine, measure, compare with the targets, publish."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine, memory, ours, page, rows, subjects, sustained
from bench.targets import verdicts

ROOT = Path(__file__).parent.parent
PARTS = ("sustained", "idle", "flood", "sparse")
IDLE, SAMPLES, SUSTAINED_S, CALLERS = (1, 100, 500), 200, 60.0, 4
QUICK_IDLE, QUICK_SAMPLES, QUICK_SUSTAINED_S = (1, 20), 20, 10.0


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def opened(force: bool) -> dict[str, Any] | None:
    """The head of a report: when, and on what machine. None, and the reason printed, when that is too busy without `force`."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that sandboxes and scratch go too
    facts = machine.facts()
    busy = machine.busy_share()
    contended = machine.too_busy(facts["load_1m"], busy, facts["cpus"])
    if contended and not force:
        print(f"not measured: {contended}. Wait, or --force to publish figures marked as contended.", file=sys.stderr)
        return None
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return {"date": date, "machine": facts | {"busy_share": busy}, "contended": contended}


def keep(report: dict[str, Any], out: Path, suffix: str = "") -> Path:
    """Where the report now is, as JSON."""
    data = out / f"{report['date'].split()[0]}-{platform.node() or 'unnamed'}{suffix}.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(report, indent=1) + "\n")
    say(f"wrote {data}")
    return data


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if (report := opened(options.force)) is None:
        return 3
    report["quick"] = options.quick
    report |= _measure(set(options.only), options.quick)
    report["load_1m_at_end"] = machine.facts()["load_1m"]
    report["targets"] = verdicts(report)
    data = keep(report, options.out)
    if not options.quick and not options.only:  # a part of the table, or few samples, are no figures to publish
        page.write(report, data, ROOT / "docs/benchmarks.md")
        say("wrote docs/benchmarks.md")
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=sys.modules["bench"].__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, 10 s sustained; writes no page")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help=f"a subject's word, or {', '.join(PARTS)}")
    parser.add_argument("--force", action="store_true", help="measure a busy machine; the result says that it was")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="where the JSON goes")
    return parser.parse_args(argv)


def _measure(only: set[str], quick: bool) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fumehood-bench-") as scratch:
        report["rows"], report["absent"] = _rows(Path(scratch), only, quick)
    if report["absent"].get("fumehood") or (only and not only & set(PARTS)):
        return report
    wanted = only or set(PARTS)
    if "sustained" in wanted:
        say("sustained load")
        report["sustained"] = sustained.measure(QUICK_SUSTAINED_S if quick else SUSTAINED_S, CALLERS)
    if "idle" in wanted:
        report["idle"] = [_idle(n) for n in (QUICK_IDLE if quick else IDLE)]
    for name, part in (("flood", memory.flood), ("sparse", memory.sparse)):
        if name in wanted:
            say(name)
            report[name] = part()
    return report


def _idle(count: int) -> dict[str, Any]:
    say(f"{count} idle sandboxes")
    return memory.idle(count)


def _rows(scratch: Path, only: set[str], quick: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """`only` names subjects by any word of theirs: zygote, crun, fumehood ..."""

    def wanted(name: str) -> bool:
        return not only or bool(only & {name, *name.split()})

    absent: dict[str, str] = {}
    found: list[subjects.Subject] = []
    if not only or only - set(PARTS) - {"fumehood", "zygote", "session", "cold"}:
        say("peers")
        subjects.install()
        found, absent = subjects.peers(scratch)
    if why := ours.why_absent():
        absent["fumehood"] = why
        return rows.measure([s for s in found if wanted(s.name)], QUICK_SAMPLES if quick else SAMPLES, say), absent
    session = ours.Session()
    try:
        chosen = [s for s in (*found, *ours.subjects(session)) if wanted(s.name)]
        return rows.measure(chosen, QUICK_SAMPLES if quick else SAMPLES, say), absent
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main())
