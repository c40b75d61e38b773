"""Train once, then try eight learning rates from exactly there: eight forks of one live sandbox, each a machine of its own.

    python docs/examples/fork_trained_state.py --tier qemu

Needs a microVM tier on this host (`fumehood doctor` says which); no server. `--template data-analysis` trains with numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fumehood import FumehoodError, Result, Sandbox

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# A logistic regression on 16 features. Each defines train(rate, rounds) and loss().
WITH_NUMPY = """
import numpy as np
random = np.random.default_rng(7)
x, truth = random.normal(size=(4_000, 16)), random.normal(size=16)
y = (x @ truth + random.normal(size=4_000) > 0).astype(float)
w = np.zeros(16)

def train(rate, rounds):
    global w
    for _ in range(rounds):
        w -= rate * x.T @ (1 / (1 + np.exp(-np.clip(x @ w, -30, 30))) - y) / len(y)

def loss():
    p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
    return float(-np.mean(y * np.log(p + 1e-12) + (1 - y) * np.log(1 - p + 1e-12)))
"""
PURE_PYTHON = """
import math, random
random.seed(7)
truth = [random.gauss(0, 1) for _ in range(16)]
x = [[random.gauss(0, 1) for _ in range(16)] for _ in range(300)]
y = [float(sum(map(float.__mul__, row, truth)) + random.gauss(0, 1) > 0) for row in x]
w = [0.0] * 16

def p(row):
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, sum(map(float.__mul__, row, w))))))

def train(rate, rounds):
    global w
    for _ in range(rounds):
        wrong = [p(row) - at for row, at in zip(x, y)]
        w = [v - rate * sum(e * row[i] for e, row in zip(wrong, x)) / len(x) for i, v in enumerate(w)]

def loss():
    return -sum(at * math.log(p(row) + 1e-12) + (1 - at) * math.log(1 - p(row) + 1e-12) for row, at in zip(x, y)) / len(x)
"""


class Tried(NamedTuple):
    rate: float
    loss: float
    seconds: float


def number(result: Result) -> float:
    if not result.ok or result.text is None:
        raise SystemExit(f"the program ended with {result.status}: {result.cause or result.stderr or result.error}")
    return float(result.text)


def attempt(fork: Sandbox, rate: float) -> Tried:
    started = time.monotonic()
    with fork:  # it ends with this block
        return Tried(rate, number(fork.run(f"train({rate}, 20); loss()")), time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=("firecracker", "qemu"), required=True)
    parser.add_argument("--template", choices=("python", "data-analysis"), default="python")
    given = parser.parse_args()
    limits = {"memory_bytes": "256MiB"}  # of each of the nine
    with Sandbox(tier=given.tier, template=given.template, limits=limits, url="") as box, contextlib.ExitStack() as undo:
        before = number(box.run((WITH_NUMPY if given.template == "data-analysis" else PURE_PYTHON) + "\nloss()"))
        trained = number(box.run("train(0.1, 20); loss()"))
        print(f"trained: the loss went from {before:.4f} to {trained:.4f}")

        started = time.monotonic()
        kept = box.snapshot()
        undo.callback(Sandbox.discard_snapshot, kept.id, tier=given.tier, url="")
        print(f"snapshot {kept.id}: {kept.size_bytes / 2**20:.0f} MiB, {time.monotonic() - started:.2f} s")

        started = time.monotonic()
        forks = box.fork(len(RATES))
        print(f"{len(forks)} forks: {time.monotonic() - started:.2f} s")
        for fork in forks:
            undo.enter_context(fork)  # also those that are never tried, when one fails
        with ThreadPoolExecutor(len(forks)) as threads:
            tried = list(threads.map(attempt, forks, RATES))
        print("\n   rate     loss  seconds")
        best = min(tried, key=lambda one: one.loss)
        for one in tried:
            print(f"{one.rate:7.3f} {one.loss:8.4f} {one.seconds:8.2f}{'  <- best' if one is best else ''}")

        box.run(f"train({best.rate}, 200)")
        further = number(box.run("loss()"))
        box.rollback(kept.id)
        again = number(box.run("loss()"))
        print(f"\n200 rounds more with {best.rate:g}: {further:.4f}; rolled back to the snapshot: {again:.4f}")
        if again != trained:
            raise SystemExit("the rollback did not bring the trained state back")


if __name__ == "__main__":
    try:
        main()
    except FumehoodError as e:
        raise SystemExit(f"error: {e}\nhelp: {e.remediation}") from None
