"""The IPython executor: InteractiveShell with its display hooks sent over the wire. Imports IPython; see python.py."""

# pyright: basic, reportIncompatibleMethodOverride=false
# IPython and traitlets annotate themselves in part only.

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import IPython
from IPython.core.autocall import ExitAutocall
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.formatters import BaseFormatter
from IPython.core.interactiveshell import InteractiveShell
from traitlets import ObjectName, Unicode
from traitlets.config import Config

from .python import Python, show_figures_left, user_frames
from .rich import CHART, DATA, FORMATS, MAX_ITEMS, TEXT, result_event
from .shells import interrupt_group, kill_all, ticks

_IPYTHON = IPython.__path__[0]
_SHELL = shutil.which("bash", path="/bin:/usr/bin") or "/bin/sh"


class _Exit(ExitAutocall):
    """exit, exit(), exit(3): ends the cell, not the session."""

    def __call__(self, code: object = None) -> None:
        raise SystemExit(code)


class _Hook(DisplayHook):
    """The last expression's value becomes the main result."""

    shell: Any

    def write_output_prompt(self) -> None:
        pass

    def write_format_data(self, format_dict: dict[str, Any], md_dict: object = None) -> None:
        self.shell.owner.emit(result_event(format_dict, main=True))

    def log_output(self, format_dict: dict[str, Any]) -> None:
        pass  # the base class keeps every bundle for ever, pictures too

    def finish_displayhook(self) -> None:
        self._is_active = False


class _Publisher(DisplayPublisher):
    shell: Any

    def publish(self, data: dict[str, Any], metadata: object = None, *_args: object, **_kwargs: object) -> None:
        self.shell.owner.emit(result_event(data, main=False))

    def clear_output(self, wait: bool = False) -> None:
        pass


class _Data(BaseFormatter):
    format_type = Unicode(DATA)
    print_method = ObjectName("_repr_fumehood_data_")
    _return_type = (dict, list)


class _Chart(BaseFormatter):
    format_type = Unicode(CHART)
    print_method = ObjectName("_repr_fumehood_chart_")
    _return_type = (dict, list)


class Shell(InteractiveShell):
    """H8: no profile, no startup files, no history file, no virtual environment taken from the environment."""

    displayhook_class = _Hook
    display_pub_class = _Publisher
    owner: Notebook

    def init_ipython_dir(self, ipython_dir: object) -> None:
        self.ipython_dir = ""

    def init_profile_dir(self, profile_dir: object) -> None:
        self.db = {}  # %cd and %bookmark keep their memory here instead of on disk

    def init_virtualenv(self) -> None:
        pass

    def _exiter_default(self) -> _Exit:
        return _Exit(self)

    def _tee(self, channel: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # the base class keeps all output in memory

    def _format_exception_for_storage(self, *_args: object, **_kwargs: object) -> dict[str, Any]:
        return {}  # a second formatting of each traceback, for a history that nobody reads

    def system(self, cmd: str) -> None:
        since = ticks()
        try:
            command = self.var_expand(cmd, depth=1)
            self.user_ns["_exit_code"] = subprocess.Popen(command, shell=True, executable=_SHELL).wait()  # noqa: S602
        except KeyboardInterrupt:  # maybe before Popen() returned: so it is found by its age
            interrupt_group()
            kill_all(os.getpid(), since, spare=True)
            raise

    system_piped = system_raw = system

    def showtraceback(self, exc_tuple: Any = None, *args: Any, **kwargs: Any) -> None:
        try:
            found: Any = self._get_exc_info(exc_tuple)
        except ValueError:
            return super().showtraceback(exc_tuple, *args, **kwargs)  # which says that there is none
        _, value, tb = found
        if isinstance(value, SystemExit):
            return None  # Notebook.run speaks about it
        if isinstance(value, asyncio.CancelledError) and self.owner.loop.interrupted:
            value = KeyboardInterrupt().with_traceback(tb)
        # IPython's own form parses the file of every frame, which in a large library takes longer than who interrupts waits.
        if isinstance(value, (BaseExceptionGroup, KeyboardInterrupt)):
            tb = user_frames(tb, _IPYTHON)
            return self._showtraceback(type(value), value, traceback.format_exception(type(value), value, tb))
        return super().showtraceback((type(value), value, tb), *args, **kwargs)

    def _showtraceback(self, etype: object, evalue: BaseException, stb: list[str]) -> None:
        self.owner.report(evalue, self.InteractiveTB.stb2text(stb))

    def show_usage_error(self, exc: BaseException) -> None:
        self.owner.report(exc, f"UsageError: {exc}")


def _config() -> Config:
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryManager.hist_file = ":memory:"
    config.InteractiveShell.colors = "nocolor"
    config.PlainTextFormatter.max_seq_length = 0  # no "..." in results: output limits are the host's affair
    config.Completer.use_jedi = False
    return config


def _quick(printer: Callable[..., None]) -> Callable[..., None]:
    """The same but for what is too long to be sent, of which repr() finds that out in a hundredth of the time."""
    return lambda value, out, cycle: out.text(repr(value)) if len(value) > MAX_ITEMS else printer(value, out, cycle)


class Notebook(Python):
    def __init__(self) -> None:
        super().__init__()
        Shell.owner = self
        self.shell: Any = Shell.instance(config=_config())
        self.shell.loop_runner = self.loop
        warnings.filterwarnings("ignore", "To exit: use 'exit'")  # exit does work here
        self.shell.events.register("post_execute", show_figures_left)
        formatter: Any = self.shell.display_formatter
        text = formatter.formatters[TEXT]
        for cls in (dict, list, set, tuple):
            text.for_type(cls, _quick(text.lookup_by_type(cls)))
        for cls in (_Data, _Chart):
            formatter.formatters[cls.format_type.default_value] = cls(parent=formatter)
        for mime, module, name, function in FORMATS:
            if module == "builtins":
                formatter.formatters[mime].for_type({"dict": dict, "list": list}[name], function)
            else:
                formatter.formatters[mime].for_type_by_name(module, name, function)

    def execute(self, code: str) -> BaseException | None:
        try:
            result = self.shell.run_cell(code, store_history=True)
        finally:
            self.execution_count = self.shell.execution_count
        error = result.error_before_exec or result.error_in_exec
        if isinstance(error, asyncio.CancelledError) and self.loop.interrupted:
            return KeyboardInterrupt()
        return error

    def reset(self) -> None:
        self.shell.reset(new_session=True)
        self.execution_count = 1
        history = self.shell.history_manager  # which forgets what it shows as In, and keeps what it shows as _i
        history._i = history._ii = history._iii = history._i00 = ""
        history.db_input_cache.clear()
