"""Which file a bad seccomp profile is in: where it is compiled, the profile is an object and its file forgotten."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from fumehood.errors import ProfileError

_NAMELESS = "given as an object"


@contextmanager
def named(policy: str | None) -> Generator[None]:
    """Errors about the profile that `policy` refers to name its file. Raises ProfileError."""
    try:
        yield
    except ProfileError as e:
        from fumehood.policy.load import profile_of

        path = profile_of(policy) if policy and e.details.get("source") == _NAMELESS else ""
        if not path:
            raise
        message, help_ = (text.replace(_NAMELESS, path) for text in (e.message, e.remediation))
        raise ProfileError(message, cause=e.cause, remediation=help_, source=path) from None
