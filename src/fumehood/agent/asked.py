"""What a session is asked, checked: the agent is another process, and not of the same mind as user code that took this one."""

from __future__ import annotations

import os
from typing import Any, cast


class Refused(Exception):
    """A request that can't be done: becomes END {"error": {"code", "message"}}."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def code_and_env(request: dict[str, Any]) -> tuple[str, dict[str, str]]:
    code, env = request.get("code"), request.get("env", {})
    if not isinstance(code, str):
        raise Refused("invalid", "code must be a string")
    if not isinstance(env, dict):
        raise Refused("invalid", "env must be an object")
    for name, value in cast(dict[str, Any], env).items():
        if not name or "=" in name or "\0" in name or not isinstance(value, str) or "\0" in value:
            raise Refused("invalid", f"env {name!r} is not a name with a string")
        try:
            os.fsencode(name + value)
        except UnicodeEncodeError:  # os.environ would raise it, and the session would end of it
            raise Refused("invalid", f"env {name!r} holds half a surrogate pair") from None
    return code, cast(dict[str, str], env)
