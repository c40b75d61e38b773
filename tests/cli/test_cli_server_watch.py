"""The verbs that watch a real server: logs, pool, templates, top."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import time

from served import Served

from fumehood.client.sandbox import Sandbox


def test_logs_show_each_execution_with_its_output_once_ended_too(server: Served) -> None:
    ran = json.loads(server.run("run", "--json", "-c", "print('first')\n40 + 2").stdout)["sandbox_id"]
    shown = server.do("logs", ran)
    assert "first\n42\n" in shown and ": ok in " in shown
    (entry,) = [json.loads(line)["execution"] for line in server.do("logs", ran, "--json").splitlines()]
    assert (entry["status"], entry["result"]["stdout"]) == ("ok", "first\n")


def test_logs_follow_until_the_sandbox_ends(server: Served, box: str) -> None:
    here = server.announced()
    with Sandbox.connect(box, url=here["url"], api_key=here["api_key"]) as joined:
        joined.run("print('before')")
    command = [*server.command, "logs", "-f", box]
    following = subprocess.Popen(command, env=server.env, stdout=subprocess.PIPE, text=True)
    assert following.stdout is not None and following.stdout.readline().startswith("--- ")  # what was; so it listens
    server.do("pause", box)
    server.do("kill", box)
    with following.stdout:
        said = following.stdout.read()  # not communicate(), which leaves out what readline() has read ahead
    assert following.wait(20) == 0 and said.startswith("before\n") and "sandbox.paused" in said and "sandbox.stopped" in said
    assert "before\n" in server.do("logs", "-f", box)
    assert server.run("logs", "-f", "snosuchsandbox").returncode == 125


def test_pool_templates_and_top_show_the_same_in_tables_and_json(server: Served, box: str) -> None:
    pools = server.json("pool")["pools"]
    assert pools and {"class", "warm", "target", "hits", "misses", "breaker"} <= pools[0].keys()
    assert len(server.do("pool").splitlines()) == len(pools)
    assert "python" in {t["name"] for t in server.json("templates")["templates"]}
    busy = subprocess.Popen(
        [*server.command, "exec", box, "--", "sh", "-c", "while :; do :; done"], env=server.env, stdin=subprocess.DEVNULL
    )
    time.sleep(1.5)
    view = server.json("top")
    busy.terminate()
    busy.wait(20)
    mine = next(s for s in view["sandboxes"] if s["id"] == box)
    assert mine["cpu_percent"] > 5 and mine["stats"]["memory_bytes"] > 0 and mine["stats"]["pids"] >= 2
    assert "scheduler" in view["status"]
    assert box in server.do("top", "--once")


def test_top_on_a_terminal_shows_how_full_the_queues_are_and_q_leaves(server: Served, box: str) -> None:
    terminal, inner = pty.openpty()
    watching = subprocess.Popen([*server.command, "top"], env={**server.env, "TERM": "xterm"}, stdin=inner, stdout=inner)
    os.close(inner)
    seen, deadline = b"", time.monotonic() + 30
    while not re.search(rb"places [1-9]\d*/\d+, waiting 0 +turns \d+/\d+, waiting 0", seen) or box.encode() not in seen:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(terminal, 65_536)
    os.write(terminal, b"q")
    assert watching.wait(20) == 0
    os.close(terminal)
