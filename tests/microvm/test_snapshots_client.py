"""Snapshots, forks and rollbacks of live machines, through the SDK over both transports, as was promised (M10, H20)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import proven
import pytest

from fumehood import AsyncSandbox, Sandbox
from fumehood.client.engine import Engine
from fumehood.config import Config
from fumehood.errors import InvalidInput, InvalidTransition, NotFound

pytestmark = [pytest.mark.microvm, pytest.mark.root]
WAIT_S = 60.0
Where = dict[str, Any]
# One line for each tenth of a second that it has lived through.
TICKING = "import time\nn = 0\nwhile True:\n    n += 1; print(n, file=open('ticks', 'a')); time.sleep(0.1)"
# What two machines must never agree on.
IDS = """
import json, os, pathlib, random, secrets, socket, subprocess, time, uuid
read = lambda path: pathlib.Path(path).read_text().strip()
print(json.dumps({
    "urandom": os.urandom(16).hex(), "secret": secrets.token_hex(16), "uuid4": str(uuid.uuid4()), "random": random.random(),
    "getrandom": os.getrandom(16).hex(), "of a program": subprocess.getoutput("od -An -N16 -tx1 /dev/urandom"),
    "kernel uuid": read("/proc/sys/kernel/random/uuid"), "boot_id": read("/proc/sys/kernel/random/boot_id"),
    "machine-id": read("/etc/machine-id"), "hostname": socket.gethostname(),
}))
"""


@pytest.fixture(scope="session")
def qemu_env(image: Callable[[str], Any], cached: Any) -> dict[str, str]:
    image("python")
    return proven.environment(cached.directory("images", "python").parents[2])


@pytest.fixture(scope="module")
def embedded(qemu_env: dict[str, str]) -> Iterator[Where]:
    Engine.of_this_process(Config.load(qemu_env)).close()  # of earlier tests, with other directories
    engine = Engine.of_this_process(Config.load(qemu_env))
    yield {"tier": "qemu", "url": ""}
    engine.close()


@pytest.fixture(scope="module")
def server(qemu_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Where]:
    with proven.server(qemu_env, tmp_path_factory.mktemp("served")) as served:
        said = served.announced()
        yield {"url": said["url"], "api_key": said["api_key"]}


@pytest.fixture(params=["embedded", "server"])
def where(request: pytest.FixtureRequest) -> Where:
    return request.getfixturevalue(request.param)


@pytest.fixture
def kept(where: Where) -> Iterator[list[str]]:
    """Snapshots that a test adds here are discarded at its end."""
    ids: list[str] = []
    yield ids
    for snapshot_id in ids:
        Sandbox.discard_snapshot(snapshot_id, **where)


@pytest.fixture
def box(where: Where) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox


def later(snapshot_id: str, where: Where) -> Sandbox:
    return Sandbox(snapshot=snapshot_id, **where)


def ticks(box: Sandbox) -> int:
    return int(box.files.read_text("ticks").split()[-1])


def eventually(true: Callable[[], Any]) -> None:
    until = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.1)


def start_ticking(box: Sandbox) -> int:
    box.files.write("tick.py", TICKING)
    pid = box.start(["python3", "tick.py"]).pid
    eventually(lambda: box.files.exists("ticks") and ticks(box) > 2)
    return pid


# -- snapshot and restore
def test_variables_files_and_programs_go_on_in_a_new_sandbox_when_the_first_has_ended(
    where: Where, box: Sandbox, kept: list[str]
) -> None:
    box.run("x = {'a': [1, 2]}; f = open('/tmp/open', 'w+'); print(f.write('half'))")
    bash = box.contexts.create("bash")
    box.run("word=kept", context=bash.id)
    pid = start_ticking(box)
    snapshot = box.snapshot()
    kept.append(snapshot.id)
    assert snapshot.sandbox_id == box.id and snapshot.size_bytes > 0
    then = ticks(box)
    box.close()
    with later(snapshot.id, where) as after:
        assert after.id != snapshot.sandbox_id
        assert after.run("x['a'].append(3); f.seek(0); x, f.read()").text == "({'a': [1, 2, 3]}, 'half')"
        assert after.run("echo $word", context=bash.id).stdout == "kept\n"
        assert pid in [process["pid"] for process in after.processes()]
        eventually(lambda: ticks(after) > then)


def test_the_first_one_goes_on_as_if_nothing_had_been(box: Sandbox, kept: list[str]) -> None:
    files, contexts = box.files, box.contexts  # taken before: they find the way afterwards too
    box.run("x = 1")
    start_ticking(box)
    kept.append(box.snapshot().id)
    before = ticks(box)
    assert box.run("x += 1; x").text == "2"
    assert files.read_text("tick.py") == TICKING and contexts.list()
    eventually(lambda: ticks(box) > before)


def test_one_snapshot_serves_many_and_they_do_not_see_each_other(where: Where, box: Sandbox, kept: list[str]) -> None:
    box.run("x = 1")
    kept.append(box.snapshot().id)
    with later(kept[0], where) as one, later(kept[0], where) as two:
        one.run("x = 'one'; open('mine', 'w').write(x)")
        assert two.run("x").text == "1" and not two.files.exists("mine")
        assert box.run("x").text == "1" and not box.files.exists("mine")
    with later(kept[0], where) as three:
        assert three.run("x").text == "1" and not three.files.exists("mine")


def test_what_was_discarded_serves_nobody_and_who_came_from_it_goes_on(where: Where, box: Sandbox) -> None:
    box.run("x = 41")
    snapshot = box.snapshot()
    with later(snapshot.id, where) as after:
        Sandbox.discard_snapshot(snapshot.id, **where)
        assert after.run("x + 1").text == "42"
        after.files.write("new", "still written")
        for call in (
            lambda: Sandbox.discard_snapshot(snapshot.id, **where),
            lambda: box.rollback(snapshot.id),
            lambda: later(snapshot.id, where).open(),
        ):
            with pytest.raises(NotFound):
                call()
    assert box.run("x").text == "41"


def test_the_list_is_newest_first_and_by_sandbox(where: Where, box: Sandbox, kept: list[str]) -> None:
    with Sandbox(**where) as other:
        kept += [box.snapshot().id, other.snapshot().id, box.snapshot().id]
        mine = Sandbox.snapshots(sandbox_id=box.id, **where)
        assert [snapshot.id for snapshot in mine] == [kept[2], kept[0]]
        assert all(s.sandbox_id == box.id and s.size_bytes > 0 and abs(s.created_at - time.time()) < 3600 for s in mine)
        everything = [snapshot.id for snapshot in Sandbox.snapshots(**where)]
        assert [i for i in everything if i in kept] == kept[::-1]
        assert [snapshot.id for snapshot in Sandbox.snapshots(limit=1, **where)] == [kept[2]]


# -- fork
def test_forks_are_open_at_once_go_on_from_there_and_do_not_see_each_other(box: Sandbox) -> None:
    box.run("x = [0]")
    box.files.write("shared", "before")
    pid = start_ticking(box)
    then = ticks(box)
    forks = box.fork(3)
    assert len({box.id, *(fork.id for fork in forks)}) == 4
    for n, fork in enumerate(forks):
        fork.run(f"x.append({n}); open('shared', 'a').write(' {n}')")
    for n, fork in enumerate(forks):
        with fork:
            assert fork.run("x").text == f"[0, {n}]" and fork.files.read_text("shared") == f"before {n}"
            assert pid in [process["pid"] for process in fork.processes()]
            eventually(lambda fork=fork: ticks(fork) > then)
    assert box.run("x").text == "[0]" and box.files.read_text("shared") == "before"
    with pytest.raises(InvalidTransition):
        forks[0].open()


def test_a_fork_of_a_fork_and_one_that_outlives_the_first(where: Where) -> None:
    with Sandbox(**where) as first:
        first.run("generation = 1")
        (second,) = first.fork(1)
    with second:
        second.run("generation += 1")
        (third,) = second.fork(1)
        with third:
            assert third.run("generation").text == "2"


def test_forks_share_no_random_number_id_or_name_h20(box: Sandbox) -> None:
    box.run("import random, uuid, secrets, ssl; random.random()")  # the generators have run before
    box.run(IDS)
    forks = box.fork(2)
    said = [fork.run(IDS) for fork in forks] + [box.run(IDS)]
    assert all(result.ok for result in said), said
    seen = [json.loads(result.stdout) for result in said]
    for fork in forks:
        fork.close()
    equal = {name for name in seen[0] if name != "hostname" and len({each[name] for each in seen}) < len(seen)}
    assert not equal, (equal, seen)


def test_forks_have_host_names_of_their_own_h20(box: Sandbox) -> None:
    said = [box.exec("hostname; cat /etc/hostname").stdout.split()]
    for fork in box.fork(1):
        with fork:
            said.append(fork.exec("hostname; cat /etc/hostname").stdout.split())
    assert all(name == file for name, file in said) and len({name for name, _ in said}) == 2


def test_clones_know_the_time_and_not_that_of_the_snapshot_h20(where: Where, box: Sandbox, kept: list[str]) -> None:
    kept.append(box.snapshot().id)
    time.sleep(3)
    started = time.time()
    with later(kept[0], where) as after:
        inside = float(after.run("import time; time.time()").text or 0)
        assert started - 1 < inside < time.time() + 1
    started = time.time()
    (fork,) = box.fork(1)
    with fork:
        assert started - 1 < float(fork.run("import time; time.time()").text or 0) < time.time() + 1


# -- rollback
def test_a_rollback_brings_back_memory_disk_and_programs(box: Sandbox, kept: list[str]) -> None:
    sandbox_id = box.id
    box.run("x = 'then'")
    box.files.write("old", "then")
    pid = start_ticking(box)
    kept.append(box.snapshot().id)
    before = ticks(box)
    box.run(f"import os; x = 'since'; os.kill({pid}, 9); os.remove('old'); open('new', 'w').write('since')")
    later_pid = box.start(["sleep", "600"]).pid
    for _ in range(2):  # as often as one likes
        box.rollback(kept[0])
        assert box.id == sandbox_id
        assert box.run("x").text == "'then'" and box.files.read_text("old") == "then" and not box.files.exists("new")
        alive = [process["pid"] for process in box.processes()]
        assert pid in alive and later_pid not in alive
        eventually(lambda: ticks(box) > before)
        box.run("x = 'since, again'")


def test_after_a_rollback_the_numbers_are_others_h20(box: Sandbox, kept: list[str]) -> None:
    kept.append(box.snapshot().id)
    first = box.run(IDS).stdout
    box.rollback(kept[0])
    assert box.run(IDS).stdout != first
    assert not set(_values(first)) & set(_values(box.run(IDS).stdout)) - {_hostname(first)}


def _values(said: str) -> list[Any]:
    return list(json.loads(said).values())


def _hostname(said: str) -> str:
    return str(json.loads(said)["hostname"])


# -- refusals
def test_while_something_runs_it_is_to_be_tried_again(box: Sandbox, kept: list[str]) -> None:
    runs = threading.Thread(target=box.run, args=("open('begun', 'w').close(); import time; time.sleep(6)",))
    runs.start()
    eventually(lambda: box.files.exists("begun"))
    for call in (box.snapshot, lambda: box.fork(1)):
        with pytest.raises(InvalidTransition) as raised:
            call()
        assert raised.value.retryable and raised.value.remediation
    runs.join(WAIT_S)
    kept.append(box.snapshot().id)


def test_more_memory_than_the_snapshot_has_is_refused(where: Where, box: Sandbox, kept: list[str]) -> None:
    kept.append(box.snapshot().id)
    with pytest.raises(InvalidInput, match="memory"):
        Sandbox(snapshot=kept[0], limits={"memory_bytes": 4 << 30}, **where).open()


def test_an_unknown_snapshot_is_not_found(where: Where, box: Sandbox) -> None:
    unknown = "p" + os.urandom(8).hex()
    for call in (
        lambda: box.rollback(unknown),
        lambda: Sandbox.discard_snapshot(unknown, **where),
        lambda: Sandbox(snapshot=unknown, **where).open(),
    ):
        with pytest.raises(NotFound):
            call()
    assert box.run("1 + 1").text == "2"


async def test_the_async_face_does_the_same(where: Where, kept: list[str]) -> None:
    async with AsyncSandbox(**where) as box:
        await box.run("x = 1")
        snapshot = await box.snapshot()
        kept.append(snapshot.id)
        assert snapshot.id in [each.id for each in await AsyncSandbox.snapshots(sandbox_id=box.id, **where)]
        for fork in await box.fork(2):
            async with fork:
                assert type(fork) is AsyncSandbox and (await fork.run("x + 1")).text == "2"
        await box.run("x = 5")
        await box.rollback(snapshot.id)
        assert (await box.run("x")).text == "1"
