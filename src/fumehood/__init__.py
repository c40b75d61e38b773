"""fumehood runs code that an AI wrote, on a machine you own, so that nothing it does matters outside.

    from fumehood import Sandbox
    with Sandbox() as box:
        print(box.run("1 + 1").text)

Names load on first use: the agent imports this package inside the sandbox, where only the stdlib is sure to be.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fumehood.client.sandbox import AsyncSandbox, Sandbox, Snapshot
    from fumehood.errors import FumehoodError
    from fumehood.model import Limits, Result
    from fumehood.policy.rules import Policy

__version__ = "0.1.0"
__all__ = ["AsyncSandbox", "FumehoodError", "Limits", "Policy", "Result", "Sandbox", "Snapshot"]

_HOME = {
    "AsyncSandbox": "fumehood.client.sandbox",
    "FumehoodError": "fumehood.errors",
    "Limits": "fumehood.model",
    "Policy": "fumehood.policy.rules",
    "Result": "fumehood.model",
    "Sandbox": "fumehood.client.sandbox",
    "Snapshot": "fumehood.client.sandbox",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fumehood' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
