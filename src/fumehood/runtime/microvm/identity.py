"""Who a machine becomes: what `bind` tells its agent."""

from __future__ import annotations

import os
import time
from base64 import b64encode
from dataclasses import asdict
from typing import Any

from fumehood.agent.args import LIMITS
from fumehood.model import FileRules, SandboxSpec

ENTROPY_BYTES = 32  # what the kernel's generator is keyed with
_UNNAMED = SandboxSpec().hostname


def identity(spec: SandboxSpec, sandbox_id: str) -> dict[str, Any]:
    """All that machines of one snapshot would share otherwise (H20), and the bounds that the guest's kernel keeps."""
    limits = spec.limits
    return {
        "clock_s": time.time(),
        "entropy": b64encode(os.urandom(ENTROPY_BYTES)).decode(),
        "hostname": sandbox_id if spec.hostname == _UNNAMED else spec.hostname,
        "limits": {name: getattr(limits, name) for name in LIMITS},
        **({} if spec.files == FileRules() else {"files": {n: list(paths) for n, paths in asdict(spec.files).items()}}),
    }
