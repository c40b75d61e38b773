"""Snapshots and forks on a server of the tier qemu: the command line, the official E2B SDK unchanged, keys of other tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import proven
import pytest
from e2b.exceptions import SandboxException
from e2b_code_interpreter import Sandbox as E2bSandbox

from cli.served import Served
from fumehood import Sandbox
from fumehood.errors import NotFound

pytestmark = [pytest.mark.microvm, pytest.mark.root]


@pytest.fixture(scope="module")
def server(image: Callable[[str], Any], cached: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    image("python")
    env = proven.environment(cached.directory("images", "python").parents[2])
    with proven.server(env, tmp_path_factory.mktemp("served")) as served:
        yield served


@pytest.fixture
def box(server: Served) -> Iterator[str]:
    made = server.do("create", "--memory", "128M").strip()
    yield made
    server.run("kill", made)


def run(server: Served, sandbox: str, code: str) -> str | None:
    said = server.announced()
    with Sandbox.connect(sandbox, url=said["url"], api_key=said["api_key"]) as box:
        return box.run(code).text


# -- the command line
def test_a_snapshot_is_kept_listed_gone_on_from_rolled_back_to_and_forgotten(server: Served, box: str) -> None:
    run(server, box, "x = 'then'")
    kept = server.do("snapshot", box, "--label", "of=cli").strip()
    assert kept in server.do("snapshots", "-q").split()
    (listed,) = server.json("snapshots", "--sandbox", box)["snapshots"]
    assert (listed["id"], listed["sandbox_id"], listed["metadata"]) == (kept, box, {"of": "cli"})
    assert (listed["tier"], listed["template"]) == ("qemu", "python") and listed["size_bytes"] > 0
    row = next(line for line in server.do("snapshots").splitlines() if line.startswith(kept))
    assert row.split("\t")[1:4] == [box, "python", "qemu"] and row.endswith("of=cli")
    run(server, box, "x = 'since'")
    assert server.do("rollback", box, kept) == f"{box}\n"
    assert run(server, box, "x") == "'then'"
    after = server.do("create", "--snapshot", kept).strip()
    assert after != box and run(server, after, "x") == "'then'"
    server.do("kill", after)
    assert server.json("snapshots", "rm", kept) == {"done": [kept], "failed": {}, "exit": 0}
    assert kept not in server.do("snapshots", "-q").split()


def test_forks_are_so_many_and_each_its_own(server: Served, box: str) -> None:
    run(server, box, "x = 1")
    forks = server.do("fork", box, "-n", "2", "--lease", "5m", "--label", "fork=yes").split()
    assert len(set(forks)) == 2 and box not in forks
    shown = {s["id"]: s for s in server.json("ps")["sandboxes"]}
    assert all(shown[fork]["metadata"] == {"fork": "yes"} and shown[fork]["tier"] == "qemu" for fork in forks)
    assert all(0 < shown[fork]["end_at"] - shown[fork]["created_at"] < 301 for fork in forks)
    run(server, forks[0], "x = 'changed'")
    assert [run(server, sandbox, "x") for sandbox in (forks[1], box)] == ["1", "1"]
    (third,) = server.json("fork", box)["sandboxes"]
    server.do("kill", *forks, third["id"])


def test_what_can_not_be_done_is_said_in_three_lines(server: Served, box: str) -> None:
    unknown = "p0123456789abcdef"
    for command in (("snapshots", "rm", unknown), ("rollback", box, unknown), ("create", "--snapshot", unknown)):
        done = server.run(*command)
        assert done.returncode == 125 and "no snapshot" in done.stderr and "\nhelp: " in done.stderr, command
    for command in (("fork", box, "-n", "0"), ("fork", box, "-n", "65"), ("create", "--snapshot", "never")):
        done = server.run(*command)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, command


# -- E2B's SDK
@pytest.fixture
def e2b(server: Served) -> Iterator[Callable[..., E2bSandbox]]:
    made: list[E2bSandbox] = []

    def create(template: str = "python", **options: Any) -> E2bSandbox:
        made.append(E2bSandbox.create(template, **e2b_options(server), **options))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill()


def e2b_options(server: Served) -> dict[str, Any]:
    said = server.announced()
    return {"api_key": said["api_key"], "api_url": said["url"], "sandbox_url": said["url"], "retries": 0}


def test_e2bs_snapshots_hold_memory_files_and_programs(server: Served, e2b: Callable[..., E2bSandbox]) -> None:
    first = e2b()
    first.run_code("x = 41")
    first.files.write("note", "kept")
    pid = first.commands.run("sleep 600", background=True).pid
    kept = first.create_snapshot()
    named = first.create_snapshot(name="trained")
    assert first.run_code("x").text == "41"
    pages = E2bSandbox.list_snapshots(sandbox_id=first.sandbox_id, **e2b_options(server))
    assert {s.snapshot_id: s.names for s in pages.next_items()} == {kept.snapshot_id: [], named.snapshot_id: ["trained"]}
    assert not pages.has_next
    (by_name,) = E2bSandbox.list_snapshots(name="trained", **e2b_options(server)).next_items()
    assert by_name.snapshot_id == named.snapshot_id
    first.kill()
    for template in (kept.snapshot_id, "trained"):
        after = e2b(template)
        assert after.run_code("x + 1").text == "42" and after.files.read("note") == "kept"
        assert pid in [process.pid for process in after.commands.list()]
        after.kill()
    assert E2bSandbox.delete_snapshot(kept.snapshot_id, **e2b_options(server))
    assert not E2bSandbox.delete_snapshot(kept.snapshot_id, **e2b_options(server))
    assert E2bSandbox.delete_snapshot("trained", **e2b_options(server))
    with pytest.raises(SandboxException):
        e2b(kept.snapshot_id)


def test_e2bs_forks_are_sandboxes_of_their_own(server: Served, e2b: Callable[..., E2bSandbox]) -> None:
    first = e2b(metadata={"of": "me"})
    first.run_code("x = 1")
    forks = first.fork(count=2, timeout=120)
    assert len({first.sandbox_id, *(fork.sandbox_id for fork in forks)}) == 3
    for n, fork in enumerate(forks):
        assert isinstance(fork, E2bSandbox)
        fork.files.write("mine", str(n))
        assert fork.run_code(f"x += {n}; x").text == str(1 + n)
    assert [fork.files.read("mine") for fork in forks] == ["0", "1"]
    assert first.run_code("x").text == "1" and not first.files.exists("mine")
    assert all(fork.kill() for fork in forks)


def test_e2bs_pause_keeps_memory_and_programs(server: Served, e2b: Callable[..., E2bSandbox]) -> None:
    box = e2b()
    box.run_code("x = 7")
    pid = box.commands.run("sleep 600", background=True).pid
    assert box.pause()
    again = E2bSandbox.connect(box.sandbox_id, **e2b_options(server))
    assert again.run_code("x").text == "7" and pid in [process.pid for process in again.commands.list()]


def test_e2bs_filesystem_only_snapshots_are_refused(e2b: Callable[..., E2bSandbox]) -> None:
    with pytest.raises(SandboxException, match="without the memory"):
        e2b().create_snapshot(mode="filesystem")


# -- tenants
def test_another_tenants_snapshots_are_as_if_they_were_not_h14(server: Served, box: str) -> None:
    kept = server.do("snapshot", box).strip()
    key = server.do("keys", "create", "--tenant", "other").strip()
    theirs: dict[str, Any] = {"url": server.announced()["url"], "api_key": key}
    with Sandbox(**theirs) as mine:
        assert Sandbox.snapshots(**theirs) == Sandbox.snapshots(sandbox_id=box, **theirs) == []
        for call in (
            lambda: mine.rollback(kept),
            lambda: Sandbox.discard_snapshot(kept, **theirs),
            lambda: Sandbox(snapshot=kept, **theirs).open(),
        ):
            with pytest.raises(NotFound, match="no snapshot"):
                call()
    assert not E2bSandbox.delete_snapshot(kept, **{**e2b_options(server), "api_key": key})
    server.do("snapshots", "rm", kept)
