"""A live sandbox and whose it is: who may use it, until when, and what happens then."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fumehood.live import Live
from fumehood.model import SandboxState
from fumehood.records import Caller, KeyLimits, OnExpiry, SandboxRecord


@dataclass(eq=False)
class Lease:
    """`end_at` is Unix time. `token` opens the sandbox's data plane (E2B, signed URLs) and dies with it.

    `ended` is set once it was killed, expired or died: whoever streams from it must stop. Only service/leases.py changes it.
    """

    live: Live
    tenant: str
    key_id: str
    tier: str
    lease_s: float
    end_at: float
    on_expiry: OnExpiry = "kill"
    auto_resume: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    key_limits: KeyLimits = field(default_factory=KeyLimits)
    created_at: float = field(default_factory=time.time)
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    give_back: Callable[[], None] = lambda: None  # its place in the admission
    queue_ms: float = 0.0  # that this place was waited for

    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at: float | None = None
    cause: str = ""
    left_s: float = 0.0  # of the lease, when it was paused
    paused_at: float | None = None
    paused_s: float = 0.0  # in all pauses that are over: they do not count as its life
    # Pausing, resuming, extending and ending wait for each other: a freeze and a thaw at once would leave the state and the
    # kernel at odds, and a freeze after a kill would keep the dead from ending.
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    timer: asyncio.TimerHandle | None = None
    watch: asyncio.Task[None] | None = None
    ending: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.live.id

    @property
    def owner(self) -> Caller:
        """The key that made it: whoever opens it with its own token acts as that."""
        return Caller(self.tenant, self.key_id, frozenset({"sandboxes"}), self.key_limits)

    @property
    def is_paused(self) -> bool:
        return self.live.state in (SandboxState.PAUSED, SandboxState.QUARANTINED)

    @property
    def record(self) -> SandboxRecord:
        spec = self.live.spec
        return SandboxRecord(
            id=self.live.id,
            tenant=self.tenant,
            key_id=self.key_id,
            template=spec.template.name,
            tier=self.tier,
            policy=spec.policy_name,
            state="stopped" if self.ended.is_set() else str(self.live.state),
            created_at=self.created_at,
            end_at=self.end_at,
            on_expiry=self.on_expiry,
            auto_resume=self.auto_resume,
            metadata=self.metadata,
            ended_at=self.ended_at,
            cause=self.cause,
        )
