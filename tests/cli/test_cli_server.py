"""Every verb through the real command line, against a real `fumehood serve`."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
from served import Served


def test_serve_says_in_words_where_it_listens_whose_key_is_where_and_what_is_enforced(server: Served) -> None:
    said = server.said.decode()
    assert server.announced()["url"] in said and str(server.file) in said
    assert "\nenforced: " in said and "(see fumehood doctor)" in said


def test_the_servers_file_is_for_its_user_alone_and_its_key_is_in_no_listing(server: Served) -> None:
    assert stat.S_IMODE(server.file.stat().st_mode) == 0o600
    secret = server.announced()["api_key"]
    assert len(secret) >= 64
    assert secret not in server.do("keys", "list", "--all", "--json") and secret not in server.said.decode()


def test_a_sandbox_lives_on_between_commands_until_it_is_killed(server: Served, box: str) -> None:
    assert server.do("exec", box, "--", "sh", "-c", "echo kept > note; echo $0") == "sh\n"
    assert server.do("exec", box, "--", "cat", "note") == "kept\n"
    listed = next(s for s in server.json("ps")["sandboxes"] if s["id"] == box)
    assert listed["metadata"] == {"of": "test"} and listed["state"] in ("ready", "running")
    assert box in server.do("ps") and box in server.do("ps", "--quiet").split()
    assert server.do("kill", box) == f"{box}\n"
    assert box not in server.do("ps", "--quiet").split()
    ended = next(s for s in server.json("ps", "--all")["sandboxes"] if s["id"] == box)
    assert ended["state"] == "stopped" and ended["cause"]


def test_exec_pipes_all_three_streams_and_leaves_with_the_programs_code(server: Served, box: str) -> None:
    big = "".join(f"line {n}\n" for n in range(20_000))
    assert server.run("exec", box, "--", "cat", stdin=big).stdout == big
    done = server.run("exec", "--env", "A=b", "--cwd", "/tmp", box, "--", "sh", "-c", "pwd; echo $A >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "/tmp\n", "b\n")
    assert server.run("exec", box, "--", "sh", "-c", "kill -9 $$").returncode == 137


def test_exec_ends_with_its_program_though_nobody_closes_its_input(server: Served, box: str) -> None:
    read, write = os.pipe()
    try:
        command = [*server.command, "exec", box, "--", "true"]
        assert subprocess.run(command, stdin=read, env=server.env, timeout=20, check=False).returncode == 0
    finally:
        os.close(read)
        os.close(write)


def test_exec_of_what_is_not_there_is_an_error_with_help(server: Served, box: str) -> None:
    for sandbox, program in ((box, "no-such-program"), ("snosuchsandbox", "true"), ("../etc", "true")):
        done = server.run("exec", sandbox, "--", program)
        assert done.returncode in (2, 125, 127) and done.stderr.startswith("error: "), (sandbox, program, done)
        assert "Traceback" not in done.stderr


def test_files_and_directories_go_in_and_out(server: Served, box: str, tmp_path: Path) -> None:
    (tmp_path / "tree/below").mkdir(parents=True)
    (tmp_path / "tree/below/x").write_bytes(bytes(range(256)) * 5000)
    (tmp_path / "one").write_text("one")
    server.do("cp", str(tmp_path / "tree"), f"{box}:/home/user")
    server.do("cp", str(tmp_path / "one"), f"{box}:/tmp/renamed")
    server.do("cp", f"{box}:tree", str(tmp_path / "back"))
    server.do("cp", f"{box}:/tmp/renamed", str(tmp_path))
    assert (tmp_path / "back/below/x").read_bytes() == bytes(range(256)) * 5000
    assert (tmp_path / "renamed").read_text() == "one"


def test_what_a_guest_named_to_do_harm_stays_inside_and_is_told_h12(server: Served, box: str, tmp_path: Path) -> None:
    evil = (
        "mkdir -p t/.git t/ok; touch t/.git/hook t/.envrc $'t/new\\nline'; ln -s /etc/passwd t/link; mkfifo t/fifo; "
        "truncate -s 1T t/holes; echo fine > t/ok/file"
    )
    server.do("exec", box, "--", "bash", "-c", evil)
    (tmp_path / "out/ok").parent.mkdir()
    (tmp_path / "aside").mkdir()
    (tmp_path / "out/ok").symlink_to(tmp_path / "aside")
    done = server.run("cp", "--json", f"{box}:t/.", str(tmp_path / "out"))
    got = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file() and not p.is_symlink()}
    assert not any("hook" in name or "envrc" in name or "\n" in name for name in got)
    assert not list((tmp_path / "aside").iterdir())
    told = " ".join(json.loads(done.stdout)["skipped"])
    assert done.returncode == 1 and all(name in told for name in ("hook", ".envrc", "link", "fifo", "holes"))


@pytest.mark.parametrize("sides", [("a", "b"), ("sabcdef:x", "sabcdef:y"), ("no-such-file", "{box}:x"), ("{box}:nothing", ".")])
def test_a_copy_that_makes_no_sense_is_refused(server: Served, box: str, sides: tuple[str, str]) -> None:
    done = server.run("cp", *(side.format(box=box) for side in sides))
    assert done.returncode in (2, 125) and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_run_uses_the_server_unless_told_not_to(server: Served) -> None:
    code = "print('ran')\n6 * 7"
    done = server.run("run", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n42\n", "")
    ran = json.loads(server.run("run", "--json", "-c", code).stdout)["sandbox_id"]
    local = json.loads(server.run("run", "--json", "--local", "-c", code).stdout)["sandbox_id"]
    known = {s["id"] for s in server.json("ps", "--all")["sandboxes"]}
    assert ran in known and local not in known


def test_run_at_a_server_ends_as_run_does_here(server: Served, tmp_path: Path) -> None:
    (server.home / "data.txt").write_text("data")
    code = "open('made.txt', 'w').write(open('data.txt').read() * 2)"
    assert server.run("run", "-c", code, "--in", "data.txt", "--out", str(tmp_path)).returncode == 0
    assert (tmp_path / "made.txt").read_text() == "datadata"
    assert server.run("run", "-c", "while True: pass", "--timeout", "0.5").returncode == 124
    assert server.run("run", "-c", "1 / 0").returncode == 1
    assert server.run("run", "-c", "1", "--policy", "no-such-preset").returncode == 2


def test_a_paused_sandbox_refuses_work_until_it_is_resumed(server: Served, box: str) -> None:
    assert server.do("pause", box) == f"{box}\n"
    assert next(s for s in server.json("ps")["sandboxes"] if s["id"] == box)["state"] == "paused"
    refused = server.run("exec", box, "--", "true")
    assert refused.returncode == 125 and "paused" in refused.stderr
    server.do("resume", box)
    server.do("exec", box, "--", "true")


def test_one_of_several_that_fails_does_not_keep_the_others(server: Served, box: str) -> None:
    done = server.run("kill", "--json", "snosuchsandbox", box)
    told = json.loads(done.stdout)
    assert told["done"] == [box] and told["failed"]["snosuchsandbox"]["code"] == "not_found"
    assert done.returncode == told["exit"] == 125 and done.stderr.startswith("error: snosuchsandbox: ")


def test_what_a_caller_wrote_into_labels_cant_steer_the_terminal(server: Served) -> None:
    made = server.do("create", "--label", "x=\x1b]52;c;aGk=\x07\nnext").strip()
    listed = server.do("ps")
    server.do("kill", made)
    assert "\x1b" not in listed and "\nnext" not in listed and made in listed


def test_keys_are_made_shown_once_used_and_revoked_beside_the_running_server(server: Served) -> None:
    made = server.json("keys", "create", "--tenant", "acme", "--name", "ci")
    own = {"FUMEHOOD_API_KEY": made["api_key"], "FUMEHOOD_URL": server.announced()["url"]}
    mine = server.run("create", env=own)
    assert mine.returncode == 0, mine.stderr
    assert mine.stdout.strip() in server.run("ps", "-q", env=own).stdout
    assert server.run("pool", env=own).returncode == 125  # not an admin's key
    assert made["api_key"][19:] not in server.do("keys", "list", "--all", "--json")
    assert server.run("kill", mine.stdout.strip(), env=own).returncode == 0
    server.do("keys", "revoke", made["id"])
    time.sleep(2.1)
    refused = server.run("ps", env=own)
    assert refused.returncode == 125 and "key" in refused.stderr
    assert made["id"] not in server.do("keys", "list") and made["id"] in server.do("keys", "list", "--all")
    assert server.run("keys", "revoke", made["id"]).returncode == 125


def test_a_key_for_e2b_is_the_same_key_with_their_prefix(server: Served) -> None:
    made = server.json("keys", "create", "--e2b")
    assert made["api_key"].startswith("e2b_" + made["id"])
    own = {"FUMEHOOD_API_KEY": made["api_key"], "FUMEHOOD_URL": server.announced()["url"]}
    assert server.run("ps", env=own).returncode == 0


@pytest.mark.parametrize("options", [["--tenant", "../x"], ["--scope", "root"], ["--priority", "11"], ["--burst", "0"]])
def test_a_key_that_makes_no_sense_is_refused(server: Served, options: list[str]) -> None:
    assert server.run("keys", "create", *options).returncode == 2


def test_a_command_that_is_interrupted_ends_its_program_inside(server: Served, box: str) -> None:
    following = subprocess.Popen(
        [*server.command, "exec", box, "--", "sleep", "61.5"], env=server.env, stdin=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 20
    while "sleep 61.5" not in (seen := _programs(server, box)):
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
    following.send_signal(2)
    assert following.wait(20) == 130
    assert "sleep 61.5" not in _programs(server, box)


def _programs(server: Served, box: str) -> str:
    script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done"
    return server.do("exec", box, "--", "sh", "-c", script)
