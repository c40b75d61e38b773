"""Python contexts: what both executors share, the executor for images without IPython, and the zygote's preload.

An executor runs cells: run(code, env) -> {"outcome": "ok|error|interrupted", "execution_count", "exit_code"?}; events
go through `emit` while the cell runs. Streams are the process's own descriptors 1 and 2.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib.abc
import importlib.util
import inspect
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import import_module
from typing import Any

from . import wire
from .rich import describe, result_event
from .streams import open_streams

Emit = Callable[[dict[str, Any]], None]
_BACKEND = f"module://{__package__}.inline"
MAX_ERROR_CHARS = 500_000
_PACKAGE = os.path.dirname(__file__) + os.sep
_prepared: Python | None = None


class StdinNotImplementedError(NotImplementedError):
    """Nobody is there to answer."""


def _encode_only(event: dict[str, Any]) -> None:
    wire.encode_json(1, wire.EVENT, event)


def _no_input(prompt: object = "", /) -> str:
    raise StdinNotImplementedError(
        f"input({str(prompt)!r}) has nobody to answer it in a sandbox: put the value in a variable or a file"
    )


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def user_frames(tb: types.TracebackType | None, *hidden: str) -> types.TracebackType | None:
    """The traceback without this package's frames (an interrupt ends in our signal handler) and those of `hidden`."""
    frames: list[types.TracebackType] = []
    while tb is not None:
        frames.append(tb)
        tb = tb.tb_next
    kept: types.TracebackType | None = None
    for one in reversed(frames):
        if not one.tb_frame.f_code.co_filename.startswith((_PACKAGE, *hidden)):
            kept = types.TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return kept


class Loop:
    """Runs coroutines on one event loop per process. An interrupt cancels the cell, so that it can't go on later."""

    def __init__(self) -> None:
        self._loop: Any = None
        self._forgotten: list[Any] = []
        self.interrupted = False

    def __call__(self, coroutine: Any) -> Any:
        import asyncio

        self.interrupted = False
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        task = self._loop.create_task(coroutine)
        try:
            return self._loop.run_until_complete(task)
        except KeyboardInterrupt:
            self.interrupted = True
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                return self._loop.run_until_complete(task)
            raise

    def forget(self) -> None:
        """After a fork the epoll set is shared with the parent; even closing it here would change the parent's."""
        self._forgotten.append(self._loop)
        self._loop = None

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None


class _InlineBackend(importlib.abc.MetaPathFinder):
    """Chooses our backend when pyplot is first imported: MPLBACKEND would be inherited by programs that lack it."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "matplotlib.pyplot":
            sys.meta_path.remove(self)
            sys.modules["matplotlib"].use(_BACKEND)  # over a use("Agg") before it, too: ours draws with Agg


def show_figures_left() -> None:
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    if helpers is not None and helpers.Gcf.figs:
        import_module(".inline", __package__).show_open_figures()


class Python:
    """What a cell's run looks like from outside, whoever executes it."""

    forkable = True
    execution_count = 1

    def __init__(self) -> None:
        self.emit: Emit = lambda _event: None
        self.loop = Loop()
        self.reported = False
        builtins.input = _no_input
        if "matplotlib.pyplot" not in sys.modules:
            sys.meta_path.insert(0, _InlineBackend())

    def run(self, code: str, env: Mapping[str, str]) -> dict[str, Any]:
        self.reported = False
        count = self.execution_count
        try:
            with environment(env):
                error = self.execute(code)
        except KeyboardInterrupt as e:  # between two steps of the executor itself
            error = e
        if isinstance(error, SystemExit):
            return {"execution_count": count, **self._exit(error)}
        if error is not None and not self.reported:
            self.report(error, "".join(traceback.format_exception(error)))
        outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "error" if self.reported else "ok"
        return {"outcome": outcome, "execution_count": count}

    def warm(self, *, fully: bool = False) -> None:
        """One cell that leaves no trace; `fully`: one for each library that is there."""
        if fully:
            _warm_up(self, set(sys.modules))
            _freeze()
            return
        emit, self.emit = self.emit, _encode_only
        try:
            self.run("1 + 1", {})
        finally:
            self.emit = emit
        self.reset()

    def execute(self, code: str) -> BaseException | None:
        raise NotImplementedError

    def reset(self) -> None:
        raise NotImplementedError

    def report(self, error: BaseException, text: str) -> None:
        self.reported = True
        try:
            value = str(error)
        except Exception as e:  # the user's own __str__
            value = f"<str() of it raised {type(e).__name__}>"
        # A frame has to hold both, at up to twelve bytes per character.
        shown = {"value": value[:MAX_ERROR_CHARS], "traceback": text[-MAX_ERROR_CHARS:]}
        self.emit({"type": "error", "name": type(error).__name__, **shown})

    def _exit(self, error: SystemExit) -> dict[str, Any]:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        if status:
            self.report(error, f"SystemExit: {error.code}")
        return {"outcome": "error" if status else "ok", "exit_code": int(status)}


class Plain(Python):
    """Cells with the stdlib alone: last expression, display(), top-level await, tracebacks. No magics."""

    def __init__(self) -> None:
        super().__init__()
        self._module = types.ModuleType("__main__")
        setattr(builtins, "display", self._display)  # noqa: B010
        self.reset()

    def reset(self) -> None:
        self.execution_count = 1
        vars(self._module).clear()
        vars(self._module).update(__name__="__main__", __builtins__=builtins, In=[""], Out={})
        sys.modules["__main__"] = self._module

    def _display(self, *values: Any) -> None:
        for value in values:
            self.emit(result_event(describe(value), main=False))

    def execute(self, code: str) -> BaseException | None:
        name = f"<cell {self.execution_count}>"
        linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
        try:
            try:
                self._cell(code, name)
            finally:
                show_figures_left()
        except BaseException as e:
            if not isinstance(e, SystemExit):
                self.report(e, "".join(traceback.format_exception(type(e), e, user_frames(e.__traceback__))))
            return e
        finally:
            self.execution_count += 1
        return None

    def _cell(self, code: str, name: str) -> None:
        tree = ast.parse(inspect.cleandoc(code) if code[:1] in " \t" else code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        self._exec(tree, name, "exec")
        if isinstance(last, ast.Expr):
            value = self._exec(ast.Expression(last.value), name, "eval")
            if value is not None and not code.rstrip().endswith(";"):
                vars(self._module)["_"] = vars(self._module)["Out"][self.execution_count] = value
                self.emit(result_event(describe(value), main=True))

    def _exec(self, tree: ast.Module | ast.Expression, name: str, mode: str) -> Any:
        code = compile(tree, name, mode, ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        made = eval(code, vars(self._module))
        return self.loop(made) if code.co_flags & inspect.CO_COROUTINE else made


def executor() -> Python:
    """The one that preload() prepared, else a new one: IPython's where it is installed."""
    return _prepared or _build()


def _build() -> Python:
    if importlib.util.find_spec("IPython") is None:
        return Plain()
    return import_module(".notebook", __package__).Notebook()


_WARM_UP: tuple[tuple[str | None, str, str], ...] = (  # module it needs, code, outcome
    (None, "1 + 1", "ok"),
    (None, "print('warm')\n[{'a': 1}]", "ok"),
    (None, "def f():\n    return 1 / 0\nf()", "error"),
    (None, "def broken(:", "error"),
    (None, "import asyncio, subprocess, random, json\nawait asyncio.sleep(0)\ndisplay('x')", "ok"),
    ("numpy", "import numpy as np\nnp.random.default_rng(1).normal(size=9).mean()", "ok"),
    (
        "pandas",
        "import pandas as pd\ndf = pd.DataFrame({'a': [1.0, 2.0], 'b': ['x', 'y'], 't': pd.to_datetime(['2024-01-01'] * 2)})\n"
        "display(df, df.describe())\ndf.groupby('b').a.sum()",
        "ok",
    ),
    (
        "matplotlib",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2], [3, 4], label='a')\nplt.title('t')\nplt.legend()\nplt.show()",
        "ok",
    ),
)


def preload(modules: Sequence[str]) -> None:
    """Import `modules`, build the executor and use it once, so that a fork of this process finds everything in memory.

    Called once, by the zygote, before it has read anything a user controls. Raises ImportError for a module that is not
    there and RuntimeError when a warm-up cell ends otherwise than it must.
    """
    global _prepared
    with contextlib.chdir("/"):  # H8: matplotlib reads a matplotlibrc from the working directory
        for module in modules:
            import_module(module)
        _prepared = _build()
        _warm_up(_prepared, {m.partition(".")[0] for m in modules})
    _freeze()


def _freeze() -> None:
    """A collection in a fork, or in a clone of this machine, would write to every object's header and copy every page."""
    gc.collect()
    gc.freeze()


def _warm_up(executor: Python, modules: set[str]) -> None:
    emit, executor.emit = executor.emit, _encode_only
    before = sys.stdout, sys.stderr
    fd = os.open(os.devnull, os.O_WRONLY)
    sys.stdout, sys.stderr = open_streams(fd, fd)
    try:
        for needs, code, outcome in _WARM_UP:
            if (needs is None or needs in modules) and executor.run(code, {})["outcome"] != outcome:
                raise RuntimeError(f"the warm-up cell {code!r} did not end with {outcome!r}")
    finally:
        sys.stdout, sys.stderr = before
        os.close(fd)
        executor.emit = emit
    executor.loop.close()
    executor.reset()
