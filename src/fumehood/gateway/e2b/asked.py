"""What E2B's clients ask for, checked: bodies of the control API as ours, and the refusal of an open network."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from starlette.requests import Request

from fumehood.records import Caller
from fumehood.service import CreateAsk

from .answers import Refusal

T = TypeVar("T", bound=BaseModel)
IGNORE_EGRESS = "ignore-egress"
DEFAULT_TIMEOUT_S = 300
MAX_PAGE = 1_000
MAX_FORKS = 20  # what the SDK asks for at most
RUN_TIMEOUT_S = 300.0  # how long the SDK lets one run_code() go on when nothing is said
# E2B's names -> a template of ours. `base` and `code-interpreter-v1` are what its two SDKs ask for when nothing is said.
TEMPLATES = {
    "base": "data-analysis",
    "code-interpreter-v1": "data-analysis",
    "data-analysis": "data-analysis",
    "python": "python",
}

Pair = Annotated[str, Field(max_length=4_096)]
Pairs = Annotated[dict[Annotated[str, Field(max_length=256)], Pair], Field(max_length=128)]


class _Body(BaseModel):
    """Members that a later SDK adds are ignored; those that would change what a sandbox may do are named below."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Network(_Body):
    allow_out: Any = Field(None, alias="allowOut")
    rules: Any = None
    egress_proxy: Any = Field(None, alias="egressProxy")
    dns_servers: Any = Field(None, alias="dnsServers")
    allow_internet_access: bool | None = None
    allow_public_traffic: bool | None = Field(None, alias="allowPublicTraffic")

    def opens(self) -> bool:
        return bool(
            self.allow_out or self.rules or self.egress_proxy or self.dns_servers or self.allow_internet_access
        )  # fmt: skip


class AutoResume(_Body):
    enabled: bool = False


class NewSandbox(_Body):
    template_id: str = Field(alias="templateID", min_length=1, max_length=256)
    metadata: Pairs = {}
    env_vars: Pairs = Field({}, alias="envVars")
    timeout: int = DEFAULT_TIMEOUT_S
    auto_pause: bool = Field(False, alias="autoPause")
    auto_pause_memory: bool = Field(True, alias="autoPauseMemory")
    auto_resume: AutoResume | None = Field(None, alias="autoResume")
    allow_internet_access: bool | None = None
    network: Network | None = None
    mcp: Any = None
    iam: Any = None
    volume_mounts: Any = Field(None, alias="volumeMounts")

    @field_validator("metadata", "env_vars", "timeout", "auto_pause", mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any, info: ValidationInfo) -> Any:
        return cls.model_fields[info.field_name or ""].get_default() if value is None else value

    def ask(self, caller: Caller, max_lifetime_s: float, snapshot: str | None) -> CreateAsk:
        """`snapshot`: what the template's name stands for, when it is none of ours. Raises Refusal."""
        refuse_open_network(self.network, self.allow_internet_access, caller)
        for name, wanted in (("mcp", self.mcp), ("iam", self.iam), ("volumeMounts", self.volume_mounts)):
            if wanted:
                raise Refusal(400, f"{name} is not supported here (docs/e2b.md)")
        if not self.auto_pause_memory:
            raise Refusal(400, "a pause that drops the memory is not supported here: processes stay as they are")
        check_timeout(self.timeout, max_lifetime_s)
        name = self.template_id.partition(":")[0]
        if snapshot is None and name not in TEMPLATES:
            raise Refusal(404, f"template '{self.template_id}' not found; here are {', '.join(TEMPLATES)}")
        return CreateAsk(
            template=None if snapshot else TEMPLATES[name],
            snapshot=snapshot,
            limits={} if snapshot else {"timeout_s": RUN_TIMEOUT_S, "lifetime_s": max(RUN_TIMEOUT_S, float(self.timeout))},
            env=self.env_vars,
            metadata=self.metadata,
            lease_s=float(self.timeout),
            on_expiry="pause" if self.auto_pause else "kill",
            auto_resume=self.auto_resume is not None and self.auto_resume.enabled,
        )


class Timeout(_Body):
    timeout: int


class Connect(_Body):
    timeout: int = DEFAULT_TIMEOUT_S
    memory: bool = True


class Pause(_Body):
    memory: bool = True


class NewSnapshot(_Body):
    name: Annotated[str | None, Field(max_length=256)] = None
    memory: bool = True


class Fork(_Body):
    timeout: int = DEFAULT_TIMEOUT_S
    count: Annotated[int, Field(ge=1, le=MAX_FORKS)] = 1


def read(model: type[T], data: bytes) -> T:
    """Raises Refusal 400 with the first thing that is wrong, and none of the values: those may be secrets."""
    try:
        return model.model_validate_json(data or b"{}")
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise Refusal(400, f"bad request body: {where or 'JSON'}: {first['msg'][:200]}") from None


def check_timeout(timeout_s: int, max_lifetime_s: float) -> None:
    if not 0 < timeout_s <= max_lifetime_s:
        raise Refusal(400, f"timeout must be from 1 to {max_lifetime_s:g} seconds")


def refuse_open_network(network: Network | None, allow_internet_access: bool | None, caller: Caller) -> None:
    """Who asks for the internet and silently gets none would look for the fault elsewhere. So it is said, unless the
    key's owner has said that he knows (`ignore-egress`): then the ask is taken, and the network stays closed."""
    wanted = bool(allow_internet_access) or (network is not None and network.opens())
    if wanted and IGNORE_EGRESS not in caller.compat:
        raise Refusal(
            400,
            "sandboxes here have no network at all, so internet access can't be allowed. Leave allow_internet_access, allowOut"
            f" and rules out, or have the operator give this key the switch {IGNORE_EGRESS!r} (docs/e2b.md)",
        )


def page_limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise Refusal(400, f"limit must be from 1 to {MAX_PAGE}")
    return int(text)


class ListAsk:
    """The query of GET /v2/sandboxes. `after` is the id that the last page ended with."""

    def __init__(self, request: Request) -> None:
        query = request.query_params
        # Encoded twice by the SDK, so the pairs are still encoded once after the query itself was decoded.
        self.metadata = {unquote(k): unquote(v) for k, v in parse_qsl(query.get("metadata", ""), keep_blank_values=True)}
        self.states = {s for part in query.getlist("state") for s in part.split(",") if s} or {"running", "paused"}
        self.newest_first = query.get("order", "desc") != "asc"
        asked = query.get("template")
        self.template, self.after = TEMPLATES.get(asked, asked) if asked else None, query.get("nextToken")
        self.limit = page_limit(query.get("limit", "100"))
        self.started_after = _seconds(query.get("startedAfter"))


def _seconds(text: str | None) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except (ValueError, OverflowError):
        raise Refusal(400, "startedAfter must be an ISO 8601 time") from None
