"""Snapshots, forks and rollbacks where the tier has none, and with wrong arguments: the same errors over both transports, and a
sandbox that is none the worse for it. And what is sent to a server, and made of its answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scripted import SANDBOX, Answer, Asked, Scripted, answer

from fumehood import AsyncSandbox, Sandbox, Snapshot
from fumehood.errors import InvalidInput, InvalidTransition, NotFound, SandboxGone, ServerUnreachable, Unsupported
from http_server import Serving, serving

KEPT = {"id": "p0123456789abcdef", "sandbox_id": SANDBOX["id"], "created_at": 5.0, "size_bytes": 7}
Where = dict[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("served"), tier="native") as started:
        yield started


@pytest.fixture(params=["native", "fake", "http"])
def where(request: pytest.FixtureRequest) -> Where:
    if request.param == "http":
        return request.getfixturevalue("server").where
    return {"tier": request.param, "url": ""}


@pytest.fixture
def box(where: Where) -> Iterator[Sandbox]:
    with Sandbox(**where) as sandbox:
        yield sandbox


# -- no tier for it
def test_a_tier_without_snapshots_says_so_with_a_way_out_and_the_sandbox_goes_on(box: Sandbox) -> None:
    box.run("x = 41")
    for call in (box.snapshot, lambda: box.fork(2), lambda: box.rollback(KEPT["id"])):
        with pytest.raises(Unsupported) as raised:
            call()
        assert raised.value.cause and raised.value.remediation and not raised.value.retryable
    assert box.run("x + 1").text == "42"


async def test_the_async_face_is_refused_likewise(where: Where) -> None:
    async with AsyncSandbox(**where) as box:
        with pytest.raises(Unsupported):
            await box.snapshot()
        with pytest.raises(Unsupported):
            await box.fork(1)
        assert (await box.run("1 + 1")).text == "2"


@pytest.mark.parametrize("tier", ["native", "fake"])
def test_without_a_server_a_tier_without_snapshots_has_no_list_of_them(tier: str) -> None:
    with pytest.raises(Unsupported):
        Sandbox.snapshots(tier=tier, url="")
    with pytest.raises(Unsupported):
        Sandbox.discard_snapshot(KEPT["id"], tier=tier, url="")
    with pytest.raises(Unsupported):
        Sandbox(snapshot=KEPT["id"], tier=tier, url="").open()


async def test_a_server_lists_none_and_knows_none(server: Serving) -> None:
    assert Sandbox.snapshots(**server.where) == await AsyncSandbox.snapshots(**server.where) == []
    with pytest.raises(NotFound):
        Sandbox.discard_snapshot(KEPT["id"], **server.where)
    with pytest.raises(NotFound):
        Sandbox(snapshot=KEPT["id"], **server.where).open()


# -- wrong arguments
@pytest.mark.parametrize("count", [0, -1, 65, True, 2.0, "2", None])
def test_a_count_of_forks_that_is_none_is_refused_before_anything_is_asked(box: Sandbox, count: Any) -> None:
    with pytest.raises(InvalidInput, match="from 1 to 64"):
        box.fork(count)


@pytest.mark.parametrize("name", ["", "never", "p0123", "P0123456789ABCDEF", "p0123456789abcdef\n", "../p0123456789abcde"])
def test_what_is_neither_a_checkpoint_nor_a_snapshot_is_not_found_h12(box: Sandbox, name: str) -> None:
    with pytest.raises(NotFound):
        box.rollback(name)


@pytest.mark.parametrize("name", ["", "never", "p0123456789abcdef/", "s0123456789abcdef", "python:1"])
def test_an_id_that_no_snapshot_has_is_refused_where_only_a_snapshot_will_do_h12(where: Where, name: str) -> None:
    with pytest.raises(InvalidInput, match="snapshot id"):
        Sandbox(snapshot=name, **where)
    with pytest.raises(InvalidInput, match="snapshot id"):
        Sandbox.discard_snapshot(name, **where)


def test_a_snapshot_has_a_template_already(where: Where) -> None:
    with pytest.raises(InvalidInput, match="template"):
        Sandbox(snapshot=KEPT["id"], template="python", **where)


def test_checkpoints_of_contexts_are_still_rolled_back_to(box: Sandbox) -> None:
    box.run("x = 1")
    kept = box.checkpoint()
    box.run("x = 2")
    box.rollback(kept)
    assert box.run("x").text == "1"


def test_labels_need_a_server_that_keeps_them() -> None:
    with Sandbox(tier="native", url="") as box, pytest.raises(InvalidInput, match="needs a server"):
        box.snapshot(metadata={"of": "me"})


# -- what goes over the wire
def _forks(n: int) -> dict[str, Any]:
    return {"sandboxes": [{**SANDBOX, "id": f"s{i:016x}"} for i in range(n)], "next": None}


def test_each_call_is_the_request_of_docs_http_md() -> None:
    def said(asked: Asked) -> Answer:
        if asked.path.endswith("/fork"):
            return answer(_forks(2), 201)
        if asked.path.startswith("/v1/snapshots?"):
            return answer({"snapshots": [KEPT], "next": None})
        return answer({**KEPT, "metadata": {"of": "me"}, "tier": "qemu"}, 201)

    with Scripted(said) as server, Sandbox(url=server.url) as box:
        kept = box.snapshot(metadata={"of": "me"})
        forks = box.fork(2)
        box.rollback(kept.id)
        box.rollback("python:1")
        listed = Sandbox.snapshots(url=server.url, sandbox_id=box.id)
        Sandbox(url=server.url, snapshot=kept.id).open()
        base = f"POST /v1/sandboxes/{box.id}"
        for fork in forks:
            fork.close()
    sent = [(f"{a.method} {a.path}", a.json) for a in server.later if a.method == "POST"]
    assert sent == [
        (f"{base}/snapshots", {"metadata": {"of": "me"}}),
        (f"{base}/fork", {"count": 2}),
        (f"{base}/rollback", {"snapshot": kept.id}),
        (f"{base}/rollback", {"checkpoint": "python:1"}),
    ]
    assert kept == Snapshot(KEPT["id"], SANDBOX["id"], 5.0, 7, {"of": "me"}) and listed == [Snapshot(**KEPT)]
    created = [a.json for a in server.asked if (a.method, a.path) == ("POST", "/v1/sandboxes")]
    assert created == [{}, {"snapshot": kept.id}]
    ended = [a.path.rsplit("/", 1)[1] for a in server.asked if a.method == "DELETE"]
    assert ended[:2] == [fork["id"] for fork in _forks(2)["sandboxes"]]


def test_a_fork_is_open_ends_with_its_block_and_can_not_come_back() -> None:
    with Scripted(lambda asked: answer(_forks(1), 201)) as server, Sandbox(url=server.url) as box:
        (fork,) = box.fork(1)
        with fork as entered:
            assert entered is fork and fork.id == "s" + "0" * 16 and fork.protections == box.protections
        with pytest.raises(InvalidTransition, match="closed"):
            fork.open()
        assert [a.path for a in server.asked if a.method == "DELETE"] == [f"/v1/sandboxes/s{'0' * 16}"]
    assert type(fork) is Sandbox


@pytest.mark.parametrize(
    "said",
    [
        answer(_forks(1), 201),
        answer({"sandboxes": "many"}, 201),
        answer({}, 201),
        answer({"sandboxes": [{**SANDBOX, "id": 7}, SANDBOX]}, 201),
    ],
)
def test_an_answer_with_other_forks_than_were_asked_for_is_none(said: bytes) -> None:
    with Scripted(lambda _: said) as server, Sandbox(url=server.url) as box, pytest.raises(ServerUnreachable):
        box.fork(2)


def test_a_copy_whose_connection_is_reset_is_asked_for_once_more_under_the_same_key() -> None:
    with Scripted(lambda _: None) as server, Sandbox(url=server.url) as box:
        for call in (box.snapshot, lambda: box.fork(1), lambda: box.rollback(KEPT["id"])):
            with pytest.raises(ServerUnreachable):
                call()
    assert [a.path.rsplit("/", 1)[1] for a in server.later] == [v for v in ("snapshots", "fork", "rollback") for _ in "12"]
    keys = [a.headers["idempotency-key"] for a in server.later]
    assert keys[::2] == keys[1::2] and len(set(keys)) == 3


@pytest.mark.parametrize("retryable", [True, False])
def test_whether_to_try_again_is_the_servers_word(retryable: bool) -> None:
    problem = {"code": "invalid_transition", "message": "an execution runs", "retryable": retryable}
    refusing = Scripted(lambda _: answer(problem, 409))
    with refusing as server, Sandbox(url=server.url) as box, pytest.raises(InvalidTransition) as raised:
        box.snapshot()
    assert raised.value.retryable is retryable


def test_a_sandbox_that_was_killed_is_gone_for_its_snapshots_too(box: Sandbox) -> None:
    box.kill()
    for call in (box.snapshot, lambda: box.fork(1), lambda: box.rollback(KEPT["id"])):
        with pytest.raises((SandboxGone, Unsupported)):  # both are true
            call()
