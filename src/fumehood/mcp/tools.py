"""The tools. Their docstrings and argument descriptions are what a model reads; each call works on its session's desk."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Concatenate, ParamSpec

from mcp.server.mcpserver import Context, MCPServer
from mcp_types import CallToolResult, ToolAnnotations
from pydantic import Field

from fumehood.errors import FumehoodError, SandboxGone
from fumehood.mcp import answers
from fumehood.mcp.desk import MAX_SANDBOXES, Desk
from fumehood.model import MIB

P = ParamSpec("P")
Ctx = Context[Any, Any]
Tool = Callable[Concatenate[Ctx, P], Awaitable[CallToolResult]]
DeskOf = Callable[[Ctx], Desk]

MAX_FILE_BYTES = 3 * MIB  # as base64 within IMAGE_BYTES
_LISTED = 500
_SCRATCH = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)  # only inside a sandbox
_LOOKS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_ENDS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)

SandboxId = Annotated[str | None, Field(description="Which sandbox; leave out for the session's default one.")]
TimeoutS = Annotated[float | None, Field(gt=0, description="Seconds until it is stopped; the policy's default otherwise.")]
Path = Annotated[str, Field(min_length=1, max_length=4096, description="Path inside the sandbox; relative to /home/user.")]


def register(server: MCPServer[Any], desk_of: DeskOf) -> None:
    """Give `server` every tool. `desk_of` finds the session of a call."""
    for function, hints in (*_running(desk_of), *_files(desk_of), *_life(desk_of)):
        server.add_tool(_answering(function, desk_of), annotations=hints, structured_output=False)


def _answering(tool: Tool[P], desk_of: DeskOf) -> Tool[P]:
    @functools.wraps(tool)
    async def answered(ctx: Ctx, *args: P.args, **kwargs: P.kwargs) -> CallToolResult:
        try:
            return await tool(ctx, *args, **kwargs)
        except SandboxGone as error:
            await _forget(desk_of(ctx), kwargs.get("sandbox_id"))
            error.remediation = "its state is lost; call again without sandbox_id and a new, empty one is made"
            return answers.from_error(error)
        except FumehoodError as error:
            return answers.from_error(error)

    return answered


async def _forget(desk: Desk, sandbox_id: object) -> None:
    """A dead sandbox holds a place until it is ended; the default one would stay dead for the whole session."""
    for known in desk.ids():
        if known == sandbox_id or (sandbox_id is None and desk.is_default(known)):
            await desk.end(known)


def _running(desk_of: DeskOf) -> list[tuple[Tool[...], ToolAnnotations]]:
    async def run_code(
        ctx: Ctx,
        code: Annotated[str, Field(max_length=1 << 20, description="The code to run.")],
        language: Annotated[str, Field(description="python, bash or javascript.")] = "python",
        context: Annotated[str | None, Field(description="An interpreter's id, from an earlier result.")] = None,
        timeout_s: TimeoutS = None,
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """Run code in an isolated sandbox without network. Variables, imports and files stay for the next call. The last
        expression and displayed charts come back, charts as images. A failing program is reported with its cause."""
        box = await desk_of(ctx).box(sandbox_id)
        result = await box.run(code, language=language, context=context, timeout_s=timeout_s)
        return answers.from_result(result)

    async def exec(
        ctx: Ctx,
        command: Annotated[str, Field(min_length=1, max_length=1 << 17, description="A line for bash.")],
        cwd: Annotated[str | None, Field(description="Directory to run it in; /home/user otherwise.")] = None,
        timeout_s: TimeoutS = None,
        stdin: Annotated[str | None, Field(max_length=1 << 20, description="Text for its standard input.")] = None,
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """Run a shell command to its end in an isolated sandbox without network: output, exit code, and what was refused."""
        box = await desk_of(ctx).box(sandbox_id)
        given = None if stdin is None else stdin.encode()
        return answers.from_result(await box.exec(command, cwd=cwd, stdin=given, timeout_s=timeout_s))

    async def checkpoint(ctx: Ctx, sandbox_id: SandboxId = None) -> CallToolResult:
        """Keep the state of the Python interpreter and of the home directory, to go back to with rollback. Threads and
        child processes are not kept."""
        name = await (await desk_of(ctx).box(sandbox_id)).checkpoint()
        return answers.from_fields({"checkpoint": name})

    async def snapshot(ctx: Ctx, sandbox_id: SandboxId = None) -> CallToolResult:
        """Keep all of a sandbox, its memory and running programs too, to go back to with rollback. Only where sandboxes are
        machines of their own; elsewhere use checkpoint. The session keeps the newest four and forgets older ones."""
        made, forgotten = await desk_of(ctx).snapshot(sandbox_id)
        return answers.from_fields({"snapshot": made.id, "size_bytes": made.size_bytes, "forgotten": forgotten})

    async def rollback(
        ctx: Ctx,
        checkpoint: Annotated[str, Field(min_length=1, max_length=100, description="What checkpoint or snapshot returned.")],
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """Undo everything since a checkpoint or a snapshot: variables and files are as they were then; of a snapshot, running
        programs too."""
        await desk_of(ctx).rollback(sandbox_id, checkpoint)
        return answers.from_fields({"rolled_back_to": checkpoint})

    return [(run_code, _SCRATCH), (exec, _SCRATCH), (checkpoint, _SCRATCH), (snapshot, _SCRATCH), (rollback, _ENDS)]


def _files(desk_of: DeskOf) -> list[tuple[Tool[...], ToolAnnotations]]:
    async def read_file(ctx: Ctx, path: Path, sandbox_id: SandboxId = None) -> CallToolResult:
        """Read a file of the sandbox, at most 3 MiB: text as text, a picture as an image, other data as base64."""
        box = await desk_of(ctx).box(sandbox_id)
        return answers.from_file(path, await box.files.read(path, limit_bytes=MAX_FILE_BYTES))

    async def write_file(
        ctx: Ctx,
        path: Path,
        content: Annotated[str, Field(max_length=MAX_FILE_BYTES, description="The whole new content, as text.")],
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """Write a text file of the sandbox; missing directories are made, an existing file is replaced."""
        entry = await (await desk_of(ctx).box(sandbox_id)).files.write(path, content)
        return answers.from_fields({"path": entry.path, "size_bytes": entry.size})

    async def list_files(
        ctx: Ctx,
        path: Path = "~",
        depth: Annotated[int, Field(ge=1, le=8, description="How many levels below path.")] = 1,
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """List a directory of the sandbox."""
        entries = await (await desk_of(ctx).box(sandbox_id)).files.list(path, depth)
        shown = [asdict(entry) for entry in entries[:_LISTED]]
        lines = [f"{e['type'][:1]} {e['size']:>10} {e['path']}" for e in shown]
        lines += [f"[{len(entries) - _LISTED} more left out]"] if len(entries) > _LISTED else []
        return answers.from_fields({"entries": shown, "total": len(entries)}, "\n".join(lines) or "(empty)")

    return [(read_file, _LOOKS), (write_file, _SCRATCH), (list_files, _LOOKS)]


def _life(desk_of: DeskOf) -> list[tuple[Tool[...], ToolAnnotations]]:
    async def create_sandbox(
        ctx: Ctx,
        policy: Annotated[str | None, Field(max_length=64, description="A preset: default, strict, data-analysis ...")] = None,
        env: Annotated[dict[str, str] | None, Field(description="Environment variables for the programs in it.")] = None,
    ) -> CallToolResult:
        """Make a further, empty sandbox beside the session's default one; name it by sandbox_id in later calls."""
        return answers.from_fields({"sandbox_id": await desk_of(ctx).create(policy, env)})

    async def fork_sandbox(
        ctx: Ctx,
        count: Annotated[int, Field(ge=1, le=MAX_SANDBOXES - 1, description="How many copies.")] = 1,
        sandbox_id: SandboxId = None,
    ) -> CallToolResult:
        """Make running copies of a sandbox with all its variables, files and programs, to try several things from the same
        state; name them by sandbox_id in later calls. Only where sandboxes are machines of their own."""
        return answers.from_fields({"sandbox_ids": await desk_of(ctx).fork(sandbox_id, count)})

    async def list_sandboxes(ctx: Ctx) -> CallToolResult:
        """The sandboxes of this session, with what each uses now."""
        desk = desk_of(ctx)
        return answers.from_fields({"sandboxes": list(await asyncio.gather(*(_row(desk, i) for i in desk.ids())))})

    async def kill_sandbox(
        ctx: Ctx, sandbox_id: Annotated[str, Field(description="What create_sandbox or list_sandboxes named.")]
    ) -> CallToolResult:
        """End a sandbox with everything in it. Its files and state are gone."""
        await desk_of(ctx).end(sandbox_id)
        return answers.from_fields({"killed": sandbox_id})

    return [(create_sandbox, _SCRATCH), (fork_sandbox, _SCRATCH), (list_sandboxes, _LOOKS), (kill_sandbox, _ENDS)]


async def _row(desk: Desk, sandbox_id: str) -> dict[str, Any]:
    box = await desk.box(sandbox_id)
    row: dict[str, Any] = {"sandbox_id": sandbox_id, "default": desk.is_default(sandbox_id)}
    try:
        return {**row, "policy": box.policy, **asdict(await box.stats())}
    except SandboxGone as gone:  # one that died is listed as dead; the others must stay visible
        return {**row, "ended": str(gone)}
