"""A result that had to go for newer ones: its record still says how it ended, over HTTP and on the command line."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx
from callers import WAIT_S, run

from fumehood.model import MIB
from http_server import Serving

SETTINGS = {"retention_bytes_per_tenant": MIB}


def test_the_record_of_a_forgotten_result_has_null_for_it_and_is_listed_by_logs(
    server: Serving, admin: httpx.Client, alice: httpx.Client
) -> None:
    box = admin.post("/v1/sandboxes", json={}).raise_for_status().json()["id"]
    for _ in range(8):
        run(admin, f"/v1/sandboxes/{box}", f"print('x' * {MIB // 4})")
    newest, *_, oldest = admin.get("/v1/executions", params={"sandbox_id": box}).json()["executions"]
    deadline = time.monotonic() + WAIT_S
    while (found := admin.get(f"/v1/executions/{oldest['id']}").json())["result"] is not None:
        assert time.monotonic() < deadline, "it is still kept"
        time.sleep(0.05)
    assert found == {**oldest, "result": None} and (found["state"], found["status"]) == ("done", "ok")
    assert len(admin.get(f"/v1/executions/{newest['id']}").json()["result"]["stdout"]) == MIB // 4 + 1
    command = [sys.executable, "-m", "fumehood", "logs", box]
    shown = subprocess.run(command, env=server.env, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout
    assert f"--- {oldest['id']}" in shown and f"--- {newest['id']}" in shown
    assert alice.get(f"/v1/executions/{oldest['id']}").status_code == 404
