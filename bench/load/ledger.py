"""What became of every request: each is entered once, and the server's own records are compared with it afterwards."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, Literal

from bench.figures import summary
from bench.load.http import Client, Reply

Fate = Literal["answered", "refused", "aborted", "unexpected", "lost", "wrong_owner"]
ANSWER_S = 90.0  # the longest a request may stay without an answer; then it counts as lost
PAGE = 100
KEPT = 5  # examples of each fate that should not be


class Ledger:
    """`answered[sandbox]`: executions that must have a record; `perhaps[sandbox]`: ours that may have one, no more."""

    def __init__(self) -> None:
        self.fates: Counter[tuple[str, Fate]] = Counter()
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.examples: dict[Fate, list[str]] = defaultdict(list)
        self.answered: Counter[str] = Counter()
        self.perhaps: Counter[str] = Counter()
        self.cut_off: set[str] = set()  # ids of executions that had started when we hung up
        self.unseen = 0  # one-shot runs that we hung up on, whose sandbox's name we never learnt

    def enter(self, kind: str, fate: Fate, why: str = "") -> None:
        self.fates[kind, fate] += 1
        if why and len(self.examples[fate]) < KEPT:
            self.examples[fate].append(f"{kind}: {why}"[:400])

    def check(self, kind: str, good: bool, why: str, otherwise: Fate) -> bool:
        self.enter(kind, "answered" if good else otherwise, "" if good else why)
        return good

    def total(self, *fates: Fate) -> int:
        return sum(n for (_, fate), n in self.fates.items() if fate in fates)

    def add(self, other: Ledger) -> None:
        """Another tenant's ledger into this one, which is then of no use for reconcile()."""
        self.fates += other.fates
        for kind, samples in other.samples.items():
            self.samples[kind] += samples
        for fate, examples in other.examples.items():
            self.examples[fate] += examples

    def report(self) -> dict[str, Any]:
        kinds = sorted({kind for kind, _ in self.fates})
        rows = {kind: {f: n for (k, f), n in sorted(self.fates.items()) if k == kind} for kind in kinds}
        times = {kind: summary(samples, ()) for kind, samples in sorted(self.samples.items())}
        for row in times.values():
            del row["samples_ms"], row["failures"], row["attempts"]
        fates: tuple[Fate, ...] = ("answered", "refused", "aborted", "unexpected", "lost", "wrong_owner")
        return {
            "requests": sum(self.fates.values()),
            **{fate: self.total(fate) for fate in fates},
            "examples": {fate: examples[:KEPT] for fate, examples in self.examples.items()},
            "by_kind": rows,
            "times": times,
        }


def clean_refusal(reply: Reply) -> str:
    """Empty when this is a refusal as promised: 429 or 503, a problem document, Retry-After. Else what is wrong with it."""
    if reply.status not in (429, 503):
        return f"status {reply.status}: {bytes(reply.body[:300])!r}"
    if not reply.headers.get("content-type", "").startswith("application/problem+json"):
        return f"{reply.status} as {reply.headers.get('content-type')}"
    if not reply.headers.get("retry-after", "").isdigit():
        return f"{reply.status} with Retry-After {reply.headers.get('retry-after')!r}"
    return ""


async def records(client: Client) -> list[dict[str, Any]]:
    """Every execution record of the key's tenant, page by page. Raises ValueError for an answer that is none."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        reply = await client.ask("GET", f"/v1/executions?limit={PAGE}{after}")
        if reply.status != 200:
            raise ValueError(f"/v1/executions answered {reply.status}: {bytes(reply.body[:300])!r}")
        page = reply.json()
        found += page["executions"]
        if not page["next"]:
            return found
        after = f"&after={page['next']}"


def reconcile(ledger: Ledger, found: list[dict[str, Any]]) -> list[str]:
    """One line for each record that is missing, doubled, foreign or unfinished. `found`: one tenant's records."""
    wrong = [f"{n} records with the id {id}" for id, n in Counter(r["id"] for r in found).items() if n > 1]
    wrong += [f"{r['id']} is still {r['state']}" for r in found if r["state"] != "done"]
    of = Counter(r["sandbox_id"] for r in found)
    strange = sum(n for sandbox, n in of.items() if not ledger.answered[sandbox] and not ledger.perhaps[sandbox])
    if strange > ledger.unseen:
        wrong.append(f"{strange} records of sandboxes that are not this tenant's; {ledger.unseen} may be")
    for sandbox in ledger.answered | ledger.perhaps:
        low, high = ledger.answered[sandbox], ledger.answered[sandbox] + ledger.perhaps[sandbox]
        if not low <= of[sandbox] <= high:
            wrong.append(f"{sandbox} has {of[sandbox]} records for {low} to {high} executions")
    ended = {r["id"]: r["status"] for r in found}
    wrong += [f"{id}, cut off by us, is {ended.get(id)}" for id in ledger.cut_off if ended.get(id) != "cancelled"]
    return wrong
