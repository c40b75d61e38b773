"""What a caller may ask a sandbox to be: its own policies, but nothing of the host's and no looser box (H12, H13)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import problem

LOOSER: dict[str, dict[str, Any]] = {
    "a root of its own": {"template": {"name": "x", "root": "/"}},
    "mounts of the host": {"template": {"name": "x", "mounts": [{"source": "/etc", "target": "/mnt/etc"}]}},
    "modules that run as the server": {"template": {"name": "x", "preload": ["antigravity"]}},
    "a system call filter of its own": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}},
}
CEILINGS = {"pids": 4_097, "output_bytes": (16 << 20) + 1, "output_kill_bytes": (16 << 30) + 1, "open_files": 65_537}
PATHS = ("/etc/passwd", "./x.toml", "../../../../etc/passwd", "x.toml", "/dev/stdin", "/proc/self/environ")


def asked(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/sandboxes", json=body)


@pytest.mark.parametrize("what", LOOSER)
@pytest.mark.parametrize("route", ["/v1/sandboxes", "/v1/run"])
def test_a_key_without_admin_may_not_loosen_the_box(alice: httpx.Client, route: str, what: str) -> None:
    code = {"code": "1"} if route == "/v1/run" else {}
    problem(alice.post(route, json={"policy": LOOSER[what], **code}), 403, "forbidden")


@pytest.mark.parametrize("name", CEILINGS)
def test_a_key_without_admin_stays_below_the_ceilings(alice: httpx.Client, name: str) -> None:
    policy = {"limits": {"output_kill_bytes": "16GiB", name: CEILINGS[name]}}
    for body in ({"limits": policy["limits"]}, {"policy": policy}):
        refused = problem(asked(alice, **body), 422, "invalid_input")
        assert name in refused["message"]


@pytest.mark.parametrize("lease", [86_401, 30 * 86_400])
def test_a_lease_is_at_most_what_the_server_gives(alice: httpx.Client, lease: float) -> None:
    problem(asked(alice, lease_s=lease), 422, "invalid_input")
    problem(asked(alice, policy={"limits": {"lifetime_s": lease}}), 422, "invalid_input")


def test_nobody_gets_a_sandbox_that_isolates_nothing(alice: httpx.Client, admin: httpx.Client) -> None:
    for http in (alice, admin):
        problem(asked(http, tier="fake"), 403, "forbidden")
    problem(asked(alice, tier="nonsense"), 422, "invalid_input")


@pytest.mark.parametrize("path", PATHS)
def test_no_policy_is_read_from_a_file_for_anybody(alice: httpx.Client, admin: httpx.Client, path: str) -> None:
    for http in (alice, admin):
        for body in ({"policy": path}, {"policy": {"extends": path}}, {"policy": {"seccomp": path}}):
            problem(asked(http, **body), 422, "invalid_policy")
    problem(asked(alice, template=path), 422, "invalid_policy")


def test_a_path_of_the_host_is_not_so_much_as_opened(alice: httpx.Client, admin: httpx.Client, tmp_path: Path) -> None:
    """To open a FIFO would hang; to look at it would show whether it is there."""
    os.mkfifo(there := tmp_path / "there.toml")
    missing = tmp_path / "nothing.toml"
    for http in (alice, admin):
        for wrap in (lambda p: {"policy": p}, lambda p: {"policy": {"extends": p}}, lambda p: {"policy": {"seccomp": p}}):
            said = [problem(asked(http, **wrap(str(path))), 422, "invalid_policy") for path in (there, missing)]
            words = [(re.sub("'[^']*'", "P", s["message"]), s["cause"], s["remediation"]) for s in said]
            assert words[0] == words[1]


def test_a_sandbox_is_what_its_policy_says(alice: httpx.Client) -> None:
    policy = {"extends": "strict", "name": "mine", "limits": {"memory_bytes": "96MiB"}, "env": {"WHO": "policy"}}
    made = asked(alice, policy=policy, limits={"pids": 40}, env={"MORE": "env"}).raise_for_status().json()
    assert made["policy"] == "mine"
    assert (made["limits"]["memory_bytes"], made["limits"]["pids"], made["limits"]["cpus"]) == (96 << 20, 40, 0.5)
    path = f"/v1/sandboxes/{made['id']}"
    code = "import os; print(os.environ['WHO'], os.environ['MORE'])"
    assert alice.post(f"{path}/executions", json={"code": code}).json()["stdout"] == "policy env\n"
    alice.delete(path).raise_for_status()


def test_an_admin_may_preload_what_the_server_has(admin: httpx.Client) -> None:
    made = asked(admin, policy={"template": {"name": "mine", "preload": ["decimal"]}}).raise_for_status().json()
    admin.delete(f"/v1/sandboxes/{made['id']}").raise_for_status()


@pytest.mark.parametrize("name", ["default", "strict", "permissive"])
def test_a_preset_is_shown_as_it_resolves(alice: httpx.Client, name: str) -> None:
    shown = alice.get(f"/v1/policies/{name}").raise_for_status().json()
    assert name in alice.get("/v1/policies").json()["policies"] and shown["policy_name"] == name
    assert shown["limits"]["pids"] > 0


def test_a_policy_s_errors_say_what_is_wrong_where(alice: httpx.Client) -> None:
    wrong = {"limits": {"memory": "1GiB"}, "network": {"mode": "host"}, "files": {"writable": ["relative"]}}
    said = problem(asked(alice, policy=wrong), 422, "invalid_policy")
    assert all(word in said["message"] for word in ("memory", "network", "writable"))
