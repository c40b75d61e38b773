"""Everything fumehood raises: one class for each thing a caller can act on.

FumehoodError
|-- InvalidInput            what you passed is wrong; nothing was started
|   |-- PolicyError         the policy document is wrong (unknown preset, contradiction, range)
|   `-- ProfileError        the seccomp JSON is wrong (names the line)
|-- ProtectionUnavailable   a required protection can't be enforced here; creation failed closed
|-- CapacityExceeded        no uid, memory, disk or place left on this host; try later
|   |-- QueueFull           the server's queue is full (retry_after_s says when to come again)
|   |-- RateLimited         your key made more requests, or holds more sandboxes, than it may
|   `-- DeadlineExceeded    the request waited in the queue until its own deadline
|-- ServerUnreachable       no server answers there, or not one of fumehood's; retry, or correct the address
|-- Unauthenticated         no API key, or one that is unknown or revoked
|-- Forbidden               the key lacks the scope for this
|-- Conflict                an idempotency key was used before for another request
|-- Draining                the server is shutting down and takes nothing new
|-- Unsupported             this tier or server can't do that (fork on the native tier)
|-- NotFound                no such sandbox, snapshot, context, process, file or checkpoint
|-- FileFault               a file operation inside the sandbox failed (errno kept)
|-- InvalidTransition       the sandbox is in a state that does not allow this
|-- SandboxGone             the sandbox ended (killed, out of memory, its zygote died); make a new one
|-- Detached                what was followed is cut off, for the sandbox was copied or rolled back; it goes on: ask again
|-- AgentUnresponsive       the agent did not answer within the deadline
|-- StoreFailed             the server's own records can't be read or written (disk full, locked, damaged, in use, newer)
|-- WireError               the guest broke the protocol; its sandbox is killed
`-- SetupFailed             a step of the creation recipe failed (names the step); all undone
"""

from __future__ import annotations

from typing import Any


class FumehoodError(Exception):
    """Base of all. `code` is stable and closed; `cause` says why, `remediation` what to do about it."""

    code = "internal"
    retryable = False

    def __init__(self, message: str, *, cause: str = "", remediation: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.remediation = remediation
        self.details = details
        if remediation:
            self.add_note(f"help: {remediation}")  # for tracebacks, which show str() and notes

    def __str__(self) -> str:
        return f"{self.message}: {self.cause}" if self.cause else self.message

    def to_dict(self) -> dict[str, Any]:
        """For JSON: code, message, cause, remediation, retryable, and details when there are any."""
        return {
            "code": self.code,
            "message": self.message,
            "cause": self.cause,
            "remediation": self.remediation,
            "retryable": self.retryable,
            **({"details": self.details} if self.details else {}),
        }


class InvalidInput(FumehoodError):
    code = "invalid_input"


class PolicyError(InvalidInput):
    code = "invalid_policy"


class ProfileError(InvalidInput):
    code = "invalid_seccomp_profile"


class ProtectionUnavailable(FumehoodError):
    code = "protection_unavailable"


class CapacityExceeded(FumehoodError):
    code = "capacity_exceeded"
    retryable = True


class QueueFull(CapacityExceeded):
    """`details["retry_after_s"]` says when to come again; so for RateLimited."""

    code = "queue_full"


class RateLimited(CapacityExceeded):
    code = "rate_limited"


class DeadlineExceeded(CapacityExceeded):
    code = "deadline_exceeded"


class ServerUnreachable(FumehoodError):
    code = "server_unreachable"
    retryable = True


class Unauthenticated(FumehoodError):
    code = "unauthenticated"


class Forbidden(FumehoodError):
    code = "forbidden"


class Conflict(FumehoodError):
    code = "conflict"


class Draining(FumehoodError):
    code = "draining"
    retryable = True


class Unsupported(FumehoodError):
    code = "unsupported"


class NotFound(FumehoodError):
    code = "not_found"


class FileFault(FumehoodError):
    """`details["errno"]` is the errno name seen inside, such as ENOENT or ENOSPC."""

    code = "file_error"


class InvalidTransition(FumehoodError):
    code = "invalid_transition"


class SandboxGone(FumehoodError):
    code = "sandbox_gone"


class Detached(FumehoodError):
    code = "detached"
    retryable = True


class AgentUnresponsive(FumehoodError):
    code = "agent_unresponsive"


class StoreFailed(FumehoodError):
    code = "store_failed"


class WireError(FumehoodError):
    code = "wire_error"


class SetupFailed(FumehoodError):
    code = "setup_failed"
