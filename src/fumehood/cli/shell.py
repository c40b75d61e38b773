"""`fumehood shell`: an interactive terminal in a new sandbox."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fumehood.cli import exits, profiles

DAY_S = 86_400.0


def shell(
    policy: Annotated[str | None, typer.Option(help="A preset or a policy file.")] = None,
    tier: Annotated[str, typer.Option(help="auto, native, firecracker, qemu or fake.")] = "auto",
    template: Annotated[str | None, typer.Option(help="What the sandbox is made from.")] = None,
    command: Annotated[str, typer.Option("--command", help="The program to start.")] = "bash",
) -> None:
    """Open a terminal in a new sandbox; it is gone when you leave."""

    async def work() -> int:
        with profiles.named(policy):
            return await _shell(command, {"policy": policy, "tier": tier, "template": template})

    exits.drive(work())


async def _shell(command: str, sandbox: dict[str, Any]) -> int:
    from fumehood.cli import terminal
    from fumehood.client.sandbox import AsyncSandbox

    terminal.demand()
    async with AsyncSandbox(**sandbox, limits={"lifetime_s": DAY_S, "timeout_s": DAY_S}) as box:
        process = await box.start([command], env=terminal.ENV, pty=terminal.size())
        return exits.code_of(await terminal.join(process))
