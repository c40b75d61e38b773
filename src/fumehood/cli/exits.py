"""Exit codes, and the one place where a verb's coroutine is run and its failure becomes a message and a code."""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from fumehood.cli.show import harmless
from fumehood.errors import FumehoodError, InvalidInput, ProtectionUnavailable, SandboxGone
from fumehood.model import Result, Status

if TYPE_CHECKING:
    from fumehood.client.process import Exit

USAGE, TIMEOUT, FAILED, REFUSED, KILLED, INTERRUPTED, UNREAD, TERMINATED = 2, 124, 125, 126, 137, 130, 141, 143

_BY_STATUS: dict[Status, int] = {
    "timeout": TIMEOUT,
    "oom": KILLED,
    "killed": KILLED,
    "pids_limit": KILLED,
    "disk_full": KILLED,
    "output_limit": KILLED,
    "quarantined": KILLED,
    "syscall_refused": REFUSED,
    "egress_denied": REFUSED,
    "approval_pending": REFUSED,
    "approval_denied": REFUSED,
    "cancelled": INTERRUPTED,
}


def exit_code(result: Result) -> int:
    """The program's own code for ok and error; a signal n that killed it is 128 + n, as in a shell."""
    if result.status in _BY_STATUS:
        return _BY_STATUS[result.status]
    if result.exit_code is None and (left := left_with(result)) is not None:
        return left
    if result.exit_code is None:
        return 0 if result.ok else 1
    return 128 - result.exit_code if result.exit_code < 0 else result.exit_code & 0xFF


def left_with(result: Result) -> int | None:
    """The code that the program itself asked to leave with: sys.exit(n) in Python, exit n in bash. Else None."""
    if result.error is None or result.error.name not in ("SystemExit", "ExitStatus"):
        return None
    if result.error.value in ("", "None"):
        return 0
    return int(result.error.value) & 0xFF if re.fullmatch(r"-?\d{1,9}", result.error.value, re.ASCII) else 1


def code_of(ended: Exit) -> int:
    """Of a program that was followed: its own, 128 + n if signal n ended it, FAILED if it vanished with its sandbox."""
    if ended.exit_code is not None:
        return ended.exit_code & 0xFF
    return FAILED if ended.signal is None else 128 + ended.signal


def failure_code(error: FumehoodError) -> int:
    if isinstance(error, InvalidInput):
        return USAGE
    if isinstance(error, ProtectionUnavailable):
        return REFUSED
    return KILLED if isinstance(error, SandboxGone) else FAILED


def complain(what: str, cause: str = "", remediation: str = "") -> None:
    for label, text in (("error", what), ("cause", cause), ("help", remediation)):
        if text:
            print(f"{label}: {harmless(text)}", file=sys.stderr)  # a machine's last words may be in it (H16)


def _run(work: Coroutine[Any, Any, int]) -> int:
    import asyncio  # --help does not need it, and it is a third of what --help would take

    return asyncio.run(until_terminated(work))


def drive(
    work: Coroutine[Any, Any, int], *, as_json: bool = False, run: Callable[[Coroutine[Any, Any, int]], int] = _run
) -> None:
    """Run a verb and leave with its code. Ctrl-C and SIGTERM cancel it, so that `async with` ends the sandbox first (unless
    `work` has signal handlers of its own).
    """
    try:
        code = run(work)
    except FumehoodError as error:
        code = failure_code(error)
        if as_json:
            with suppress(BrokenPipeError):
                print_json({"error": error.to_dict(), "exit": code})
        complain(error.message, error.cause, error.remediation)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # whoever read stdout left (`| head`): a shell's programs end so, too, and say nothing
        code = UNREAD
    except Exception:  # a bug of ours: shown whole, but its code is not mistaken for the program's
        traceback.print_exc()
        code = FAILED
    raise typer.Exit(code)


async def until_terminated(work: Coroutine[Any, Any, int]) -> int:
    """Cancelled by SIGTERM, unless `work` puts a handler of its own in the place of this one."""
    import asyncio

    task = asyncio.ensure_future(_heard(work))
    terminated = asyncio.Event()

    def stop() -> None:
        terminated.set()
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    with suppress(asyncio.CancelledError):
        return await task
    if terminated.is_set():
        return TERMINATED
    raise KeyboardInterrupt  # asyncio.run cancelled us for SIGINT; by now the sandbox is gone


async def _heard(work: Coroutine[Any, Any, int]) -> int:
    try:
        return await work
    except SystemExit:  # rich's way to say that nobody reads; it would tear down the loop before any `async with`
        raise BrokenPipeError from None


def print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, default=str), flush=True)  # while whoever calls can still tell that nobody reads
