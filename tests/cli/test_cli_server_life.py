"""How `fumehood serve` begins and ends: what it refuses, what it leaves, what a killed one's successor says."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served


@pytest.fixture
def served(command: list[str], tmp_path: Path) -> Iterator[Served]:
    made = Served(command, tmp_path)
    yield made
    if getattr(made, "process", None) is not None and made.process.poll() is None:
        made.stop()


def _refused(served: Served, *options: str) -> str:
    process = served.begin(*options)
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (2, 125), said.decode()
    assert said.decode().startswith("error: ") and "\nhelp: " in said.decode() and "Traceback" not in said.decode(), said
    return said.decode()


def test_the_next_server_cleans_up_after_a_killed_one_and_the_history_says_so_h19(served: Served) -> None:
    served.start()
    made = served.do("create").strip()
    running = subprocess.Popen([*served.command, "run", "-c", "while True: pass"], env=served.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while len(served.json("ps")["sandboxes"]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    served.kill()
    assert running.wait(30) == 125
    assert served.file.exists()
    nobody = served.run("ps")
    assert nobody.returncode == 125 and "help: start one with fumehood serve" in nobody.stderr
    served.start()
    ended = {s["id"]: s for s in served.json("ps", "--all")["sandboxes"]}
    assert ended[made]["state"] == "stopped" and "killed" in ended[made]["cause"] and len(ended) == 2
    assert served.json("ps")["sandboxes"] == []


def test_sigterm_drains_what_runs_and_takes_the_file_away(served: Served, tmp_path: Path) -> None:
    served.start()
    code = "import time; print('begun', flush=True); time.sleep(2); print('finished')"
    running = subprocess.Popen([*served.command, "run", "-c", code], env=served.env, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stdout.readline() == "begun\n"
    assert served.stop() == 0
    assert running.communicate(timeout=30)[0] == "finished\n" and running.returncode == 0
    assert not served.file.exists()
    assert "draining" in served.said.decode() and "stopped" in served.said.decode()


def test_what_runs_longer_than_the_grace_is_ended(command: list[str], tmp_path: Path) -> None:
    served = Served(command, tmp_path, grace_s=0.5).start()
    running = subprocess.Popen([*command, "run", "-c", "while True: pass"], env=served.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not served.json("ps")["sandboxes"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert served.stop() == 0
    assert running.wait(30) != 0


def test_a_second_ctrl_c_does_not_wait_for_what_runs(command: list[str], tmp_path: Path) -> None:
    served = Served(command, tmp_path, grace_s=600).start()
    running = subprocess.Popen([*command, "run", "-c", "while True: pass"], env=served.env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not served.json("top")["status"]["executions"]:
        assert time.monotonic() < deadline
    served.process.send_signal(signal.SIGINT)
    served.hear("again stops at once")
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == served.stop() == 0
    assert running.wait(30) != 0 and not served.file.exists()


def test_a_signal_while_it_starts_leaves_nothing_behind(served: Served) -> None:
    served.process = served.begin()
    deadline = time.monotonic() + 30
    while not (served.state / "store.db").exists():
        assert time.monotonic() < deadline
    assert served.stop() in (0, 143) and not served.file.exists()
    served.start()
    assert "killed" not in served.said.decode()


def test_one_store_has_one_server(served: Served) -> None:
    served.start()
    said = _refused(served, "--listen", "127.0.0.1:0")
    assert str(served.process.pid) in said
    assert served.announced()["pid"] == served.process.pid


def test_a_taken_port_is_said(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = _refused(served, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert "in use" in said
    assert not served.file.exists()


@pytest.mark.parametrize("options", [["0.0.0.0:0", "--no-auth"], ["nonsense"], ["127.0.0.1:99999"], ["unix:relative"]])
def test_listening_where_it_should_not_is_refused_h14(served: Served, options: list[str]) -> None:
    _refused(served, "--listen", *options)


def test_listening_everywhere_it_is_found_on_loopback_wherever_this_users_commands_are_sent(served: Served) -> None:
    served.env["FUMEHOOD_URL"] = "http://127.0.0.1:1"  # of commands; a server that asked it would find nobody
    served.start("--listen", "0.0.0.0:0")
    assert "warning: keys cross the network" in served.said.decode()
    url = served.announced()["url"]
    assert url.startswith("http://127.0.0.1:")
    key = served.announced()["api_key"]
    assert served.do("run", "-c", "6 * 7", "--url", url, "--api-key", key) == "42\n"


def test_without_the_server_part_it_says_what_to_install(command: list[str], tmp_path: Path) -> None:
    lacking = [command[0], "-c", f"import sys; sys.modules['fastapi'] = None; {command[2]}"]
    said = _refused(Served(lacking, tmp_path))
    assert "fastapi is not installed" in said and "fumehood[server]" in said


def test_a_weak_key_of_the_operators_is_refused_h14(command: list[str], tmp_path: Path) -> None:
    _refused(Served(command, tmp_path, server_key="changeme"), "--listen", "127.0.0.1:0")


def test_without_keys_it_serves_this_machine_only(command: list[str], tmp_path: Path) -> None:
    served = Served(command, tmp_path, "--no-auth").start()
    try:
        assert "no key" in served.said.decode()
        assert served.do("run", "-c", "6 * 7") == "42\n"
    finally:
        served.stop()


def test_a_unix_socket_is_found_like_a_port_and_closed_to_others(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    served = Served(command, tmp_path).start("--listen", f"unix:{path}")
    try:
        assert served.announced()["url"] == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        box = served.do("create").strip()
        assert served.do("exec", box, "--", "echo", "over the socket") == "over the socket\n"
    finally:
        assert served.stop() == 0
    assert not path.exists()


def test_a_stale_file_does_not_send_its_key_to_whoever_took_the_port(served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        url = f"http://127.0.0.1:{other.getsockname()[1]}"  # and the pid of a process that lives, which proves nothing
        served.file.write_text(json.dumps({"url": url, "api_key": "secret", "pid": os.getpid()}))
        assert served.run("ps").returncode == 125
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.accept()
