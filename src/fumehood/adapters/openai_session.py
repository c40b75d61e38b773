"""One session of the OpenAI Agents SDK's sandbox agents: what it calls, in the words of a fumehood sandbox."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from agents.sandbox.errors import ExecTimeoutError, ExecTransportError, WorkspaceArchiveReadError, WorkspaceArchiveWriteError
from agents.sandbox.errors import WorkspaceReadNotFoundError as ReadNotFound
from agents.sandbox.session import BaseSandboxClientOptions, SandboxSessionState
from agents.sandbox.types import ExecResult, User

from fumehood.adapters.openai_terminals import Terminals
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import FumehoodError, NotFound, SandboxGone, Unsupported
from fumehood.model import MIB, Result

_ARCHIVE = "/tmp/.fumehood-workspace.tar"
_ARCHIVE_BYTES, _READ_BYTES = 256 * MIB, 64 * MIB
_ENDED = 137


class FumehoodOptions(BaseSandboxClientOptions):
    """For one session, laid over the client's. Never a key or an address: options travel in serialised run state."""

    type: Literal["fumehood"] = "fumehood"  # pyright: ignore[reportIncompatibleVariableOverride] # how the SDK tells them apart
    policy: str | None = None
    limits: dict[str, int | float] | None = None


class FumehoodState(SandboxSessionState):
    type: Literal["fumehood"] = "fumehood"  # pyright: ignore[reportIncompatibleVariableOverride] # how the SDK tells them apart
    sandbox_id: str = ""
    options: FumehoodOptions = FumehoodOptions()


class FumehoodSession(Terminals):
    """Programs and files of one sandbox, in the SDK's words. Paths are resolved inside, so a link leads nowhere else."""

    def __init__(self, state: FumehoodState, box: AsyncSandbox) -> None:
        super().__init__(box)
        self.state = state

    def preserved(self, alive: bool) -> None:
        self._set_start_state_preserved(alive)

    def _prepare_exec_command(self, *command: str | Path, shell: bool | list[str], user: str | User | None) -> list[str]:
        _one_user(user)
        return super()._prepare_exec_command(*command, shell=shell, user=None)

    async def _environment(self) -> Mapping[str, str]:
        return {**await self.state.manifest.environment.resolve(), "HOME": self.state.manifest.root}

    async def _prepare_backend_workspace(self) -> None:
        if not await self._box.files.exists(self.state.manifest.root):
            await self._box.files.mkdir(self.state.manifest.root)

    async def _exec_internal(self, *command: str | Path, timeout: float | None = None) -> ExecResult:  # noqa: ASYNC109 # the SDK's name
        argv = [str(part) for part in command]
        try:
            env = await self._environment()
            result = await self._box.exec(argv, cwd=self.state.manifest.root, env=env, timeout_s=timeout)
        except FumehoodError as error:
            raise ExecTransportError(
                command=command, cause=error, retryable=error.retryable, context=error.to_dict()
            ) from error
        if result.status == "timeout":
            raise ExecTimeoutError(command=command, timeout_s=timeout, context={"cause": result.cause})
        return _as_exec(result)

    async def read(self, path: Path, *, user: str | User | None = None) -> io.IOBase:
        return io.BytesIO(await self._bytes(path, user, _READ_BYTES))

    async def write(self, path: Path, data: io.IOBase, *, user: str | User | None = None) -> None:
        _one_user(user)
        inside = self.normalize_path(path, for_write=True)
        content = data.read()
        try:
            await self._box.files.write(str(inside), content)
        except FumehoodError as error:
            raise WorkspaceArchiveWriteError(path=inside, cause=error, context=error.to_dict()) from error

    async def running(self) -> bool:
        return await alive(self._box)

    async def persist_workspace(self) -> io.IOBase:
        """A tar archive, made inside. It is the guest's word, so the SDK keeps it and only a sandbox ever unpacks it (H12)."""
        skip = [f"--exclude=./{path.as_posix()}" for path in self._persist_workspace_skip_relpaths()]
        packed = await self.exec("tar", "-cf", _ARCHIVE, *skip, "-C", self.state.manifest.root, ".", shell=False)
        if not packed.ok():
            raise WorkspaceArchiveReadError(path=Path(self.state.manifest.root), context={"stderr": packed.stderr.decode()})
        try:
            return io.BytesIO(await self._box.files.read(_ARCHIVE, limit_bytes=_ARCHIVE_BYTES))
        finally:
            await self._box.files.remove(_ARCHIVE)

    async def hydrate_workspace(self, data: io.IOBase) -> None:
        root = self.state.manifest.root
        await self._prepare_backend_workspace()
        await self._box.files.write(_ARCHIVE, data.read())
        try:
            unpacked = await self.exec("tar", "-xf", _ARCHIVE, "--no-same-owner", "-C", root, shell=False)
        finally:
            await self._box.files.remove(_ARCHIVE)
        if not unpacked.ok():
            raise WorkspaceArchiveWriteError(path=Path(root), context={"stderr": unpacked.stderr.decode()})

    async def _read_bounded(self, path: Path, *, max_bytes: int) -> bytes:
        return (await self._bytes(path, None, _READ_BYTES))[:max_bytes]

    async def _bytes(self, path: Path, user: str | User | None, limit_bytes: int) -> bytes:
        _one_user(user)
        inside = self.normalize_path(path)
        try:
            return await self._box.files.read(str(inside), limit_bytes=limit_bytes)
        except NotFound as error:
            raise ReadNotFound(path=inside, cause=error) from error
        except FumehoodError as error:
            raise WorkspaceArchiveReadError(path=inside, cause=error, context=error.to_dict()) from error


def _one_user(user: str | User | None) -> None:
    if user is not None:
        raise Unsupported("a sandbox has one user", cause=f"{user!r} was asked for", remediation="leave run_as and user out")


async def alive(box: AsyncSandbox) -> bool:
    try:
        await box.stats()
    except SandboxGone:
        return False
    return True


def _as_exec(result: Result) -> ExecResult:
    """What a signal ended has no exit code of its own: 137 as in a shell, and the cause where a model reads it."""
    by_itself = result.exit_code is not None and result.status in ("ok", "error")
    told = result.stderr if by_itself else f"{result.stderr}\n{result.status}: {result.cause}\n"
    code = _ENDED if result.exit_code is None else result.exit_code
    return ExecResult(stdout=result.stdout.encode(), stderr=told.encode(), exit_code=code)
