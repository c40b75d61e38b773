"""OpenAI Agents SDK: its sandbox agents on fumehood, and a plain tool for agents without one.

    run = RunConfig(sandbox=SandboxRunConfig(client=FumehoodSandboxClient(policy="strict")))
    await Runner.run(SandboxAgent(name="coder", model=model), "fix the tests", run_config=run)

A session is one sandbox. The workspace is /home/user/workspace unless the manifest says otherwise; there are no mounts, other
users or exposed ports inside. Output is captured as text up to the policy's output_bytes.
"""

from __future__ import annotations

import uuid
from typing import Any

from agents import FunctionTool, RunContextWrapper, ToolOutputImage, ToolOutputText, function_tool
from agents.sandbox.manifest import Manifest
from agents.sandbox.session import (
    BaseSandboxClient,
    Dependencies,
    Instrumentation,
    SandboxSession,
    SandboxSessionState,
)
from agents.sandbox.snapshot import SnapshotBase, SnapshotSpec, resolve_snapshot

from fumehood.adapters.openai_session import FumehoodOptions, FumehoodSession, FumehoodState, alive
from fumehood.client import told
from fumehood.client.sandbox import AsyncSandbox
from fumehood.errors import FumehoodError

WORKSPACE = "/home/user/workspace"


class FumehoodSandboxClient(BaseSandboxClient[FumehoodOptions | None]):
    """`sandbox` are AsyncSandbox's arguments for every session. resume() reattaches to a sandbox that this client still
    holds; otherwise it makes a new one and the SDK restores the snapshot into it."""

    backend_id = "fumehood"
    supports_default_options = True

    def __init__(
        self, *, instrumentation: Instrumentation | None = None, dependencies: Dependencies | None = None, **sandbox: Any
    ) -> None:
        self._instrumentation = instrumentation or Instrumentation()
        self._dependencies = dependencies
        self._sandbox = sandbox
        self._held: dict[str, AsyncSandbox] = {}

    async def create(
        self,
        *,
        snapshot: SnapshotSpec | SnapshotBase | None = None,
        manifest: Manifest | None = None,
        options: FumehoodOptions | None = None,
    ) -> SandboxSession:
        manifest = self._validate_manifest_for_create(manifest or Manifest())
        if manifest.root == Manifest().root:  # /, where that is, can't be written inside
            manifest = manifest.model_copy(update={"root": WORKSPACE}, deep=True)
        number = uuid.uuid4()
        state = FumehoodState(
            session_id=number,
            manifest=manifest,
            snapshot=resolve_snapshot(snapshot, str(number)),
            options=options or FumehoodOptions(),
        )
        return await self._session(state)

    async def resume(self, state: SandboxSessionState) -> SandboxSession:
        if not isinstance(state, FumehoodState):
            raise TypeError(f"a {state.type} session can't be resumed by fumehood")
        state.assert_path_grants_rebound()
        return await self._session(state)

    async def delete(self, session: SandboxSession) -> SandboxSession:
        """End the sandbox with everything in it. Idempotent."""
        state = session.state
        if not isinstance(state, FumehoodState):
            raise TypeError("this session is not of fumehood")
        if (box := self._held.pop(state.sandbox_id, None)) is not None:
            await box.close()
        return session

    def deserialize_session_state(self, payload: dict[str, object]) -> SandboxSessionState:
        return self._deserialize_session_state_payload(payload, FumehoodState)

    async def _session(self, state: FumehoodState) -> SandboxSession:
        box = self._held.get(state.sandbox_id)
        preserved = box is not None and await alive(box)
        if box is None or not preserved:
            self._held.pop(state.sandbox_id, None)
            box = await AsyncSandbox(**self._arguments(state.options)).open()
            self._held[box.id] = box
            state.sandbox_id, state.workspace_root_ready = box.id, False
        inner = FumehoodSession(state, box)
        inner.preserved(preserved)
        return self._wrap_session(inner, instrumentation=self._instrumentation)

    def _arguments(self, options: FumehoodOptions) -> dict[str, Any]:
        limits = {**self._sandbox.get("limits", {}), **(options.limits or {})}
        return {**self._sandbox, "limits": limits, **({"policy": options.policy} if options.policy else {})}


def run_python(box: AsyncSandbox) -> FunctionTool:
    """A tool for any Agent: Python in `box`, which is the caller's to open and to close. State stays between calls."""

    @function_tool(name_override="run_python", failure_error_function=_explain)
    async def run(code: str, timeout_s: float | None = None) -> list[ToolOutputText | ToolOutputImage]:
        """Run Python code in an isolated sandbox without network. Variables and files stay for the next call.

        Args:
            code: The code; its last expression, output and charts come back.
            timeout_s: Seconds until it is stopped.
        """
        return [_output(part) for part in told.parts(await box.run(code, timeout_s=timeout_s))]

    return run


def _output(part: told.Part) -> ToolOutputText | ToolOutputImage:
    if part[0] == "text":
        return ToolOutputText(text=part[1])
    return ToolOutputImage(image_url=f"data:{part[1]};base64,{part[2]}")


def _explain(_: RunContextWrapper[Any], error: Exception) -> str:
    if not isinstance(error, FumehoodError):
        raise error
    return f"{error.code}: {error}. {error.remediation}"
