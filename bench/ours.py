"""fumehood's own rows: from nothing, from a warm zygote, in a live session."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.subjects import SNIPPETS, Subject, check, timed
from fumehood import Sandbox
from fumehood.errors import FumehoodError

POLICY = "data-analysis"  # its zygote holds numpy, pandas, matplotlib and IPython
_TIMED = "import time as _time; _began = _time.perf_counter()\n{}\nprint('own time', _time.perf_counter() - _began)"


def run(box: Sandbox, snippet: str) -> None:
    result = box.run(SNIPPETS[snippet])
    check(snippet, result.stdout if result.ok else f"{result.status}: {result.cause}")


def cold(snippet: str) -> dict[str, float]:
    """A new process with no zygote: what one call from a shell costs. pandas comes with its own policy."""
    program = str(Path(sys.executable).with_name("fumehood"))
    policy = [] if snippet == "print" else ["--policy", POLICY]
    return timed(snippet, [program, "run", *policy, "-c", SNIPPETS[snippet]])


def zygote(snippet: str) -> dict[str, float]:
    """Create, first result, destroy."""
    started = time.perf_counter()
    with Sandbox(policy=POLICY) as box:
        created = time.perf_counter()
        run(box, snippet)
        ran = time.perf_counter()
    ended = time.perf_counter()
    parts = {"create": created - started, "run": ran - created, "destroy": ended - ran, "": ended - started}
    return {name: seconds * 1e3 for name, seconds in parts.items()}


class Session:
    """One sandbox for all samples, its first run done. `over` is what a run costs beyond the code's own time inside."""

    def __init__(self) -> None:
        self._box = Sandbox(policy=POLICY).open()
        for snippet in SNIPPETS:
            self.once(snippet)

    def once(self, snippet: str) -> dict[str, float]:
        started = time.perf_counter()
        result = self._box.run(_TIMED.format(SNIPPETS[snippet]))
        took = time.perf_counter() - started
        output, _, own = result.stdout.rpartition("own time ")
        check(snippet, output if result.ok else f"{result.status}: {result.cause}")
        return {"": took * 1e3, "over": (took - float(own)) * 1e3}

    def close(self) -> None:
        self._box.close()


def subjects(session: Session) -> list[Subject]:
    return [
        Subject("fumehood cold", "`fumehood run -c`, a new process and no zygote", cold),
        Subject("fumehood zygote", f"create, first result, destroy; warm zygote, policy {POLICY}", zygote),
        Subject("fumehood session", "a run in a live session", session.once),
    ]


def why_absent() -> str:
    """Empty when sandboxes can be made here. Also warms the zygote, which no figure may include."""
    try:
        zygote("print")
    except FumehoodError as e:
        return str(e)[-600:]
    return ""
