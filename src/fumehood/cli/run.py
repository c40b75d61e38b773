"""`fumehood run`: one program in one new sandbox, its output live, its outcome as the exit code."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from fumehood.cli import exits, files, profiles, reach, show
from fumehood.cli.reach import KeyOption, UrlOption
from fumehood.errors import Draining, InvalidInput, SandboxGone, ServerUnreachable
from fumehood.model import Result

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox

EPILOG = (
    "Exit codes: the program's own (128 + n if signal n ended it); 2 wrong usage (options, program, policy); 124 timeout; "
    "137 out of memory or stopped by another limit; 125 fumehood failed; "
    "126 refused (a system call, the network, a protection that cannot be enforced); 130 Ctrl-C, the sandbox is gone."
)
_LANGUAGES = {".py": "python", ".sh": "bash", ".bash": "bash", ".js": "javascript", ".mjs": "javascript"}
_NOT_RUN = {".rb": "Ruby", ".pl": "Perl", ".go": "Go", ".rs": "Rust", ".c": "C", ".cc": "C++", ".cpp": "C++", ".java": "Java",
            ".ts": "TypeScript", ".php": "PHP", ".lua": "Lua", ".r": "R", ".jl": "Julia", ".ipynb": "a notebook"}  # fmt: skip
_PICTURES = {"image/png": "png", "image/jpeg": "jpg", "image/svg+xml": "svg", "application/pdf": "pdf"}
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Job(NamedTuple):
    code: str
    language: str
    sandbox: dict[str, Any]  # keyword arguments of AsyncSandbox
    timeout_s: float | None
    copy_in: list[Path]
    copy_out: Path | None
    as_json: bool


def run(
    file: Annotated[str | None, typer.Argument(help="The program; - reads it from standard input.")] = None,
    code: Annotated[str | None, typer.Option("-c", help="The program as text.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one Result object and nothing else.")] = False,
    language: Annotated[str | None, typer.Option(help="python, bash or javascript; if absent, by suffix")] = None,
    timeout: Annotated[str | None, typer.Option(help="Time for the program, such as 90, 90s or 5m.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory, such as 512M or 2G.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Processors, such as 0.5.")] = None,
    pids: Annotated[int | None, typer.Option(help="Processes and threads.")] = None,
    disk: Annotated[str | None, typer.Option(help="Bytes of files, such as 256M.")] = None,
    policy: Annotated[str | None, typer.Option(help="A preset or a policy file.")] = None,
    copy_in: Annotated[list[Path] | None, typer.Option("--in", help="Copied into /home/user (repeatable).")] = None,
    copy_out: Annotated[Path | None, typer.Option("--out", help="Where changed files and figures are copied.")] = None,
    env: Annotated[list[str] | None, typer.Option("--env", help="K=V (repeatable).")] = None,
    tier: Annotated[str, typer.Option(help="auto, native, firecracker, qemu or fake.")] = "auto",
    template: Annotated[str | None, typer.Option(help="What the sandbox is made from.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, even if a server runs.")] = False,
    url: UrlOption = None,
    api_key: KeyOption = None,
) -> None:
    """Run a program in a new sandbox: in the server if one runs, else in this process."""

    async def work() -> int:
        seconds = None if timeout is None else parse_duration(timeout)
        lifetime = seconds + 60 if seconds and seconds > 240 else None  # the default lifetime would end it first
        limits = limits_of(timeout_s=seconds, lifetime_s=lifetime, memory_bytes=memory, cpus=cpus, pids=pids, disk_bytes=disk)
        sandbox = {"policy": policy, "template": template, "limits": limits, "env": pairs(env or [], "--env"), "tier": tier}
        text, spoken = _program(file, code, language)
        sandbox |= await reach.transport(url, api_key, local)
        job = Job(text, spoken, sandbox, seconds, copy_in or [], copy_out, as_json)
        with profiles.named(policy):
            return await _run(job)

    exits.drive(work(), as_json=as_json)


async def _run(job: Job) -> int:
    from fumehood.client.sandbox import AsyncSandbox

    if job.copy_out:
        files.prepare(job.copy_out)
    async with _closed(AsyncSandbox(**job.sandbox)) as box:
        for path in job.copy_in:
            files.report(await files.copy_in(box, path))
        result = await box.run(job.code, language=job.language, timeout_s=job.timeout_s, **_live(job.as_json))
        tier = box.tier
        if job.copy_out:
            await _collect(box, result, job.copy_out)
    if job.as_json:
        exits.print_json(to_json(result) | {"tier": tier})
    else:
        _show(result)
    return exits.exit_code(result)


@contextlib.asynccontextmanager
async def _closed(box: AsyncSandbox) -> AsyncGenerator[AsyncSandbox]:
    """A server that stopped meanwhile has ended the sandbox itself, which makes no failure of a program that has ended well."""
    await box.open()
    try:
        yield box
    finally:
        with contextlib.suppress(ServerUnreachable, Draining):
            await box.close()


def to_json(result: Result) -> dict[str, Any]:
    """The Result as an object; `exit_code` is the program's own, `exit` the one that the command leaves with."""
    return dataclasses.asdict(result) | {"exit": exits.exit_code(result)}


def _live(as_json: bool) -> dict[str, Any]:
    if as_json:
        return {}
    return {"on_stdout": partial(show.write, sys.stdout), "on_stderr": partial(show.write, sys.stderr)}


def _show(result: Result) -> None:
    if result.text is not None:
        show.write(sys.stdout, result.text + "\n")
    if result.error and exits.left_with(result) is None:
        show.write(sys.stderr, result.error.traceback.rstrip() + "\n")
    if result.status not in ("ok", "error"):
        exits.complain(f"the program ended as {result.status}", result.cause, _ADVICE.get(result.status, ""))


_ADVICE: dict[str, str] = {
    "timeout": "allow more with --timeout TIME",
    "oom": "allow more with --memory SIZE",
    "pids_limit": "allow more with --pids N",
    "disk_full": "allow more with --disk SIZE",
    "output_limit": "print less, or write to a file and use --out",
    "syscall_refused": "choose another --policy if the program may use this system call",
    "egress_denied": "the sandbox has no network in this generation; bring data in with --in",
}


async def _collect(box: AsyncSandbox, result: Result, out: Path) -> None:
    # Caches and settings that libraries keep below hidden directories are no work of the program's: not worth a note.
    paths = [c.path for c in result.changes if c.kind != "removed" and "/." not in os.path.dirname(c.path)]
    try:
        files.report(await files.copy_out(box, paths, out))
    except SandboxGone as e:  # the program took its sandbox along; its Result is still worth showing
        files.report([f"no file was copied out: {e.message}"])
    pictures = [(kind, value) for shown in result.results for kind, value in shown.data.items() if kind in _PICTURES]
    for number, (kind, value) in enumerate(pictures, 1):
        try:
            files.write_plain(out, (f"figure-{number}.{_PICTURES[kind]}",), _picture_bytes(kind, value))
        except binascii.Error as e:
            files.report([f"figure {number} was not copied out: {kind} data that is not base64: {e}"])


def _picture_bytes(kind: str, value: Any) -> bytes:
    if kind == "image/svg+xml":
        return str(value).encode(errors="replace")
    return base64.b64decode(str(value), validate=False)


def _program(file: str | None, code: str | None, language: str | None) -> tuple[str, str]:
    """(text, language). Raises InvalidInput unless there is exactly one readable program."""
    if (file is None) == (code is None):
        cause = "there is none" if file is None else "there are two: FILE and -c"
        raise InvalidInput(
            "give exactly one program", cause=cause, remediation="fumehood run FILE, -c CODE, or - for standard input"
        )
    if code is not None:
        return code, language or "python"
    if file == "-":
        return sys.stdin.read(), language or "python"
    try:
        path = Path(file or "")
        return path.read_text(encoding="utf-8"), language or _by_suffix(path)
    except (OSError, UnicodeDecodeError) as e:
        raise InvalidInput(f"can't read the program {file}", cause=str(e), remediation="name a UTF-8 text file") from None


def _by_suffix(path: Path) -> str:
    if other := _NOT_RUN.get(path.suffix.lower()):
        cause = f"{path.suffix} is {other}; python, bash and javascript can be run"
        raise InvalidInput(f"can't run {path}", cause=cause, remediation="give --language if it is one of these all the same")
    return _LANGUAGES.get(path.suffix, "python")


def limits_of(**asked: float | str | None) -> dict[str, Any]:
    return {k: parse_size(v) if isinstance(v, str) else v for k, v in asked.items() if v is not None}


def parse_size(text: str) -> int:
    """Bytes: `1048576`, `512M`, `1.5GiB`. Raises InvalidInput."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match:
        raise InvalidInput(
            f"bad size {text!r}", cause="not a number and a unit", remediation="write a number and K, M, G or T, such as 512M"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def parse_duration(text: str) -> float:
    """Seconds, written as in a policy: `90`, `90s`, `5m`. Raises InvalidInput."""
    from fumehood.policy.rules import duration

    try:
        return duration(text.strip())
    except ValueError as e:
        raise InvalidInput(f"bad time {text!r}", cause=str(e), remediation="write seconds, or a unit, such as 90s") from None


def pairs(given: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping. Raises InvalidInput that names `option`."""
    for pair in given:
        if "=" not in pair[1:]:
            raise InvalidInput(f"bad {option} {pair!r}", cause="no name and = before a value", remediation="write NAME=VALUE")
    return dict(pair.split("=", 1) for pair in given)
