"""The table: every subject does every snippet, in turns, so that a busy second falls on all of them alike."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from bench.figures import percentile, summary
from bench.subjects import SNIPPETS, Subject, Wrong
from fumehood.errors import FumehoodError

TURN = 10  # a subject's samples come in blocks of this many, so that each has the caches that steady use gives it
BUDGET_MS = 12_000.0  # of a subject and snippet: slow ones get fewer samples, never less than a turn

Say = Callable[[str], None]


class Tally:
    """Samples and failures of one subject with one snippet."""

    def __init__(self, subject: Subject, snippet: str) -> None:
        self.subject, self.snippet = subject, snippet
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.failures: list[str] = []

    @property
    def attempts(self) -> int:
        return len(self.samples[""]) + len(self.failures)

    def once(self) -> None:
        try:
            measured = self.subject.once(self.snippet)
        except (Wrong, FumehoodError, subprocess.TimeoutExpired) as e:
            self.failures.append(f"{type(e).__name__}: {e}"[-400:])
            return
        for metric, ms in measured.items():
            self.samples[metric].append(ms)

    def wanted(self, samples: int) -> int:
        """As many as the budget holds of the median one: the run has to end, and the row says how many it was."""
        affordable = BUDGET_MS / percentile(self.samples[""], 50) if self.samples[""] else TURN
        return max(TURN, min(samples, int(affordable)))

    def row(self) -> dict[str, Any]:
        head = {"name": self.subject.name, "what": self.subject.what, "snippet": self.snippet}
        parts = {m: summary(s, ()) for m, s in self.samples.items() if m}
        return head | summary(self.samples[""], self.failures) | {"parts": parts}


def measure(subjects: Sequence[Subject], samples: int, say: Say) -> list[dict[str, Any]]:
    """At most `samples` of each subject and snippet, after one that does not count."""
    tallies = [Tally(subject, snippet) for snippet in SNIPPETS for subject in subjects]
    for tally in tallies:
        Tally(tally.subject, tally.snippet).once()
    while waiting := [t for t in tallies if t.attempts < t.wanted(samples)]:
        for tally in waiting:
            for _ in range(min(TURN, tally.wanted(samples) - tally.attempts)):
                tally.once()
        say(f"rows: {sum(t.attempts for t in tallies)} samples, {len(waiting)} of {len(tallies)} rows not done")
    return [tally.row() for tally in tallies]
