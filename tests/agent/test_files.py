"""files.*: plain calls inside the sandbox, that no file made by user code can turn against the agent (H12)."""

from __future__ import annotations

import os
import resource
import stat
from typing import Any

import pytest

from fumehood.agent import wire

from .conftest import Client, StartAgent


def code_of(answer: Any) -> tuple[str, str | None]:
    assert answer.error is not None
    return answer.error["code"], answer.error.get("errno")


def follow(agent: Client, path: str = "~", recursive: bool = False) -> int:
    stream = agent.open("files.watch", path=path, recursive=recursive)
    agent.event(stream, "ready")
    return stream


def changes(agent: Client, watch: int, last: tuple[str, str]) -> list[tuple[str, str]]:
    """All changes up to and with `last`, in order."""
    seen: list[tuple[str, str]] = []
    while not seen or seen[-1] != last:
        event = agent.event(watch, "change")
        seen.append((event["change"], event["name"]))
    return seen


def test_what_is_written_is_read_whole_or_in_part(agent: Client) -> None:
    data = os.urandom(5 << 20)
    entry = agent.upload("a/b/c.bin", data, mode=0o640).ok
    assert entry is not None
    described = entry["entry"]
    assert (described["type"], described["size"], described["mode"]) == ("file", len(data), 0o640)
    assert described["path"] == f"{agent.home}/a/b/c.bin" and described["owner"]
    assert agent.call("files.read", path="a/b/c.bin").output[wire.FILE] == data
    part = agent.call("files.read", path="~/a/b/c.bin", offset=1000, length=100_000)
    assert part.output[wire.FILE] == data[1000:101_000] and part.ok == {"size": 100_000}
    assert agent.call("files.read", path="a/b/c.bin", offset=len(data)).ok == {"size": 0}


def test_a_second_write_replaces_the_first_and_keeps_the_mode(agent: Client) -> None:
    agent.upload("f", b"long content", mode=0o600)
    agent.upload("f", b"short")
    assert (agent.home / "f").read_bytes() == b"short"
    assert stat.S_IMODE((agent.home / "f").stat().st_mode) == 0o600


def test_an_empty_upload_is_an_empty_file(agent: Client) -> None:
    assert agent.upload("empty", b"").ok is not None
    assert (agent.home / "empty").read_bytes() == b""


def test_a_cancelled_upload_leaves_no_half_file(agent: Client) -> None:
    stream = agent.open("files.write", path="half")
    agent.data(stream, b"x" * (3 << 20))
    agent.send(stream, wire.CANCEL)
    agent.finish(stream)
    assert not (agent.home / "half").exists()


@pytest.mark.parametrize("make", ["mkfifo trap", "ln -s /dev/zero trap", "ln -s /dev/tty trap", "mkdir trap"])
@pytest.mark.parametrize("verb", ["files.read", "files.write"])
def test_only_regular_files_are_read_and_written(agent: Client, make: str, verb: str) -> None:  # H12
    agent.sh(make)
    assert code_of(agent.call(verb, path="trap"))[0] == "file_error"
    assert agent.ok("ping") == {}


def test_a_fifo_with_a_reader_is_not_written_either(agent: Client) -> None:  # H12
    agent.sh("mkfifo trap")
    agent.open("exec.start", argv=["sh", "-c", "cat trap >stolen"])
    agent.sh("sleep 0.2")
    assert code_of(agent.call("files.write", path="trap"))[0] == "file_error"


def test_devices_are_refused_before_a_byte_is_written(agent: Client) -> None:  # H12
    assert code_of(agent.call("files.write", path="/dev/full")) == ("file_error", "ENXIO")


@pytest.mark.root
def test_a_full_disk_is_said_and_leaves_no_half_file(start_agent: StartAgent) -> None:  # H15
    agent = start_agent("--init", "--disk", str(4 << 20))
    agent.hello()
    assert code_of(agent.upload("big", bytes(8 << 20))) == ("file_error", "ENOSPC")
    assert code_of(agent.call("files.stat", path="big")) == ("not_found", "ENOENT")
    assert agent.upload("small", bytes(1 << 20)).ok is not None


def test_missing_paths_and_bad_arguments_have_clear_errors(agent: Client) -> None:
    assert code_of(agent.call("files.stat", path="no")) == ("not_found", "ENOENT")
    assert code_of(agent.call("files.read", path="no")) == ("not_found", "ENOENT")
    assert code_of(agent.call("files.remove", path="no")) == ("not_found", "ENOENT")
    assert code_of(agent.call("files.list", path="no")) == ("not_found", "ENOENT")
    assert code_of(agent.call("files.stat", path="a\0b"))[0] == "invalid"
    assert code_of(agent.call("files.stat", path=7))[0] == "invalid"
    assert code_of(agent.call("files.stat", path="x" * 300)) == ("file_error", "ENAMETOOLONG")
    agent.upload("plain", b"")
    assert code_of(agent.call("files.list", path="plain")) == ("invalid", "ENOTDIR")
    assert code_of(agent.call("files.watch", path="plain")) == ("invalid", "ENOTDIR")
    assert code_of(agent.call("files.write", path="plain/below"))[0] in ("exists", "file_error")


def test_a_link_is_described_not_followed(agent: Client) -> None:
    agent.sh("ln -s /etc/passwd link")
    entry = agent.ok("files.stat", path="link")["entry"]
    assert (entry["type"], entry["target"]) == ("symlink", "/etc/passwd")


def test_a_listing_is_depth_first_sorted_and_does_not_enter_links(agent: Client) -> None:
    agent.sh("mkdir -p b/y a/x; touch a/x/1 b/2 c; ln -s / d")
    answer = agent.call("files.list", path="~", depth=3)
    names = [os.path.relpath(e["path"], agent.home) for event in answer.events for e in event["entries"]]
    assert names == ["a", "a/x", "a/x/1", "b", "b/2", "b/y", "c", "d"]
    assert answer.ok == {"count": 8}
    assert agent.ok("files.list", path="~") == {"count": 4}


def test_long_listings_come_in_batches(agent: Client) -> None:
    agent.sh("seq 1234 | xargs touch")
    answer = agent.call("files.list", path="~")
    assert [len(event["entries"]) for event in answer.events] == [500, 500, 234]


def test_names_that_are_not_utf8_or_have_newlines_survive_the_way(agent: Client) -> None:  # H12
    for name in (b"\xff\xfe", b"two\nlines", b"-rf"):
        (agent.home / os.fsdecode(name)).touch()
    answer = agent.call("files.list", path="~")
    names = {os.fsencode(e["name"]) for e in answer.events[0]["entries"]}
    assert names == {b"\xff\xfe", b"two\nlines", b"-rf"}
    agent.ok("files.remove", path=os.fsdecode(b"\xff\xfe"))
    assert len(os.listdir(agent.home)) == 2


def test_directories_are_made_with_parents_once(agent: Client) -> None:
    assert agent.ok("files.mkdir", path="p/q")["entry"]["type"] == "directory"
    assert code_of(agent.call("files.mkdir", path="p/q")) == ("exists", "EEXIST")


def test_a_move_makes_parents_and_crosses_file_systems(agent: Client) -> None:
    agent.sh("mkdir -p d/e; echo x > d/e/f; ln -s f d/e/l; chmod 640 d/e/f; mkdir /dev/shm/$(basename ~)")
    assert agent.ok("files.move", source="d", destination="n/m")["entry"]["path"] == f"{agent.home}/n/m"
    other = f"/dev/shm/{agent.home.name}/moved"
    agent.ok("files.move", source="n/m", destination=other)
    seen = agent.sh(f"cd {other} && cat e/f && readlink e/l && stat -c %a e/f; rm -r /dev/shm/$(basename ~)")
    assert seen.stdout == "x\nf\n640\n"
    assert not (agent.home / "n/m").exists()
    assert code_of(agent.call("files.move", source="no", destination="x")) == ("not_found", "ENOENT")


def test_a_tree_is_removed_whatever_its_depth_modes_and_names(agent: Client) -> None:  # H12
    deep = (
        "import os\nfor i in range(3000):\n os.mkdir('d'); os.chdir('d')\n"
        "os.symlink('/', 'root'); open('.removing-0', 'w'); os.mkdir('.removing-1')"
    )
    assert agent.call("exec.start", argv=["/usr/bin/python3", "-c", deep], cwd="~").stderr == ""
    agent.sh("mkdir -p d/shut/in; touch d/shut/in/f; chmod 0 d/shut/in d/shut; touch d/.removing-5; ln -s /etc d/etc")
    agent.ok("files.remove", path="d")
    assert os.listdir(agent.home) == []
    assert agent.sh("test -e /etc/passwd").ok == {"exit_code": 0, "signal": None, "changed": []}


def test_a_link_is_removed_not_its_target_and_home_stays(agent: Client) -> None:
    agent.sh("mkdir keep; touch keep/f; ln -s keep l")
    agent.ok("files.remove", path="l")
    assert (agent.home / "keep/f").exists()
    assert code_of(agent.call("files.remove", path="~"))[0] == "invalid"


def test_other_requests_pass_while_many_files_are_removed(agent: Client) -> None:
    agent.sh("mkdir many; cd many; seq 30000 | xargs touch")
    removal = agent.open("files.remove", path="many")
    assert agent.ok("ping") == {}
    assert agent.finish(removal).ok == {}


def test_a_fresh_upload_is_exactly_create_chmod_write(agent: Client) -> None:
    watch = follow(agent)
    agent.upload("f.bin", b"x" * 200_000)
    agent.upload("last", b"")
    seen = changes(agent, watch, ("chmod", "last"))
    assert seen == [("create", "f.bin"), ("chmod", "f.bin"), ("write", "f.bin"), ("create", "last"), ("chmod", "last")]


def test_a_move_is_rename_then_create_and_a_removal_is_remove(agent: Client) -> None:
    agent.sh("touch a")
    watch = follow(agent)
    agent.sh("mv a b; rm b")
    assert changes(agent, watch, ("remove", "b")) == [("rename", "a"), ("create", "b"), ("remove", "b")]


def test_a_recursive_watch_announces_each_thing_in_new_directories_once(agent: Client) -> None:
    agent.sh("mkdir -p old/er")
    watch = follow(agent, recursive=True)
    agent.sh("mkdir -p n/e/s; : > n/e/s/t; : > old/er/f; mv n moved; : > moved/e/g; : > last")
    seen = changes(agent, watch, ("create", "last"))
    creates = [name for change, name in seen if change == "create"]
    assert sorted(creates) == sorted(
        # Which of the two names the tree was announced under depends on when the agent looked.
        {*creates} | {"n", "old/er/f", "moved", "moved/e", "moved/e/g", "last"}
    )


def test_a_flat_watch_does_not_look_below(agent: Client) -> None:
    agent.sh("mkdir d")
    watch = follow(agent)
    agent.sh(": > d/f; : > last")
    assert changes(agent, watch, ("create", "last")) == [("create", "last")]


def test_a_watch_ends_by_cancel_or_with_its_directory(agent: Client) -> None:
    agent.sh("mkdir d")
    first, second = follow(agent, "d"), follow(agent, "d")
    agent.send(first, wire.CANCEL)
    assert agent.finish(first).ok == {}
    agent.sh("rmdir d")
    assert code_of(agent.finish(second)) == ("not_found", "ENOENT")


def test_too_many_watches_are_refused_and_given_back(agent: Client) -> None:  # H15
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (64, 64))
    streams = [agent.open("files.watch", path="~", recursive=False) for _ in range(64)]
    assert code_of(agent.finish(streams[-1])) == ("file_error", "EMFILE")
    for stream in streams[:-1]:
        agent.send(stream, wire.CANCEL)
    follow(agent)
