"""The server under test: `fumehood serve` as a process of its own, with directories of its own; and what it holds."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import processes
from bench.load.http import Client, Gone

PROGRAM = str(Path(sys.executable).with_name("fumehood"))
START_S, STOP_S = 90.0, 60.0
CALM_S, CALM_LOOK_S = 60.0, 1.0  # how long after the load the server may take to be as before


class NoServer(Exception):
    """`fumehood serve` did not come up; the message has the end of what it said."""


class Server:
    """Started by `start()`, ended by `stop()`. `settings` are FUMEHOOD_* variables without the prefix, in lower case."""

    def __init__(self, work: Path, **settings: object) -> None:
        self._state, self._run, self.log = work / "state", work / "run", work / "server.log"
        variables = {"state_dir": self._state, "run_dir": self._run, **settings}
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FUMEHOOD_")}
        self._env = clean | {f"FUMEHOOD_{k.upper()}": str(v) for k, v in variables.items()}
        self.host, self.port, self.key = "127.0.0.1", 0, ""

    def start(self) -> Server:
        for directory in (self._state, self._run):
            directory.mkdir(0o700, parents=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "serve", "--listen", "127.0.0.1:0"], env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        try:
            self._await_key(time.monotonic() + START_S)
            asyncio.run(self._await_ready(time.monotonic() + START_S))
        except BaseException:
            self.stop()
            raise
        return self

    def _await_key(self, until: float) -> None:
        file = self._state / "server.json"
        while not file.exists():
            self._alive_before(until)
            time.sleep(0.05)
        found = json.loads(file.read_text())
        self.port, self.key = int(found["url"].rpartition(":")[2].rstrip("/")), found["api_key"]

    async def _await_ready(self, until: float) -> None:
        client = self.client()
        while True:
            try:
                if (await client.ask("GET", "/readyz")).status == 200:
                    return client.close()
            except (OSError, Gone):
                pass  # not listening yet; whether it ever will is asked next
            self._alive_before(until)
            await asyncio.sleep(0.05)

    def _alive_before(self, until: float) -> None:
        if (code := self._process.poll()) is not None:
            raise NoServer(f"fumehood serve ended with {code}: {self.tail()}")
        if time.monotonic() > until:
            raise NoServer(f"fumehood serve was not ready within {START_S:g} s: {self.tail()}")

    def tail(self, size: int = 1500) -> str:
        return self.log.read_text(errors="replace")[-size:]

    def stop(self) -> int:
        """Its exit code: SIGTERM, and SIGKILL for one that does not drain."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            # Its run_dir goes with this run, and then nobody could find what the killed one left: let the next one remove it.
            subprocess.run(
                [PROGRAM, "run", "--local", "-c", "pass"], env=self._env, capture_output=True, timeout=START_S, check=False
            )
            return code

    def client(self, key: str | None = None) -> Client:
        return Client(self.host, self.port, self.key if key is None else key)

    def make_key(self, tenant: str, options: Sequence[str]) -> str:
        command = [PROGRAM, "keys", "create", "--json", "--tenant", tenant, *options]
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode:
            raise NoServer(f"no key for {tenant}: {done.stderr[-400:]}")
        return json.loads(done.stdout)["api_key"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def rss_mib(self) -> float:
        return round(processes.status_kib(self.pid, "VmRSS") / 1024, 2)

    def held(self) -> dict[str, float]:
        """What the server, its zygotes and the host hold for sandboxes, seen from outside. Counts, and MiB for `*_mib`."""
        family = processes.family(self.pid)
        instances = [d.name for d in (self._run / "instances").glob("*") if d.is_dir()]
        return {
            "descriptors": processes.entries(f"/proc/{self.pid}/fd"),
            "threads": processes.entries(f"/proc/{self.pid}/task"),
            "processes": len(family),
            "zombies": sum(processes.is_zombie(pid) for pid in family),
            "mounts": processes.lines(f"/proc/{self.pid}/mountinfo"),
            "uids": len({uid for pid in family if (uid := processes.status_kib(pid, "Uid"))}),
            "cgroups": sum(any(f"/{name}/" in f"{d}/" for name in instances) for d in processes.cgroups()),
            "instances": len(instances),
            "run_entries": sum(1 for _ in self._run.rglob("*")),
            "rss_mib": self.rss_mib(),
            "family_pss_mib": round(sum(map(processes.pss_kib, family)) / 1024, 2),
        }

    def calm(self, before: dict[str, float], allowed: frozenset[str] = frozenset()) -> tuple[dict[str, float], float]:
        """(what it holds once that is as `before`, or after CALM_S; the seconds that took). Memory is not waited for."""
        started = time.monotonic()
        while True:
            now, took_s = self.held(), time.monotonic() - started
            same = all(now[k] == before[k] for k in before if not k.endswith("_mib") and k not in allowed)
            if same or took_s > CALM_S:
                return now, round(took_s, 1)
            time.sleep(CALM_LOOK_S)


async def status(client: Client) -> dict[str, Any]:
    reply = await client.ask("GET", "/v1/status")
    if reply.status != 200:
        raise ValueError(f"/v1/status answered {reply.status}: {bytes(reply.body[:200])!r}")
    return reply.json()


def broken(text: str) -> bool:
    """Whether a server's log has a line of an unexpected failure: a traceback, or a level above warning."""
    return bool(re.search(r"Traceback \(most recent|\"level\": ?\"(error|critical)\"", text, re.IGNORECASE))
