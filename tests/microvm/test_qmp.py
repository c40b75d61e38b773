"""What QEMU's monitor says is hostile input (H16): whatever it is, the client gets an answer, or a QmpFault in time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fumehood.runtime.microvm import qmp
from fumehood.runtime.microvm.qmp import LINE_BYTES, Lines, Qmp, QmpEnded, QmpFault

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}
names = st.sampled_from(["QMP", "return", "error", "event", "id", "desc", "data"])
leaves = st.sampled_from([None, True, False, -1, 0, 1, 2, 1.5, "", "x", [], {}, [1], {"desc": "x"}, {"desc": 1}])
messages = st.dictionaries(names, leaves | st.dictionaries(names, leaves, max_size=2), max_size=4)


class Peer:
    """QEMU's side of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection

    def send(self, *said: Any) -> None:
        self.socket.sendall(b"".join(s if isinstance(s, bytes) else json.dumps(s).encode() + b"\r\n" for s in said))

    async def asked(self) -> Any:
        return json.loads(await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16))

    async def answer(self, **answer: Any) -> Any:
        """To the next command, which is returned."""
        command = await self.asked()
        self.send({**answer, "id": command["id"]})
        return command


@contextlib.asynccontextmanager
async def pair() -> AsyncIterator[tuple[Qmp, Peer]]:
    ours, theirs = socket.socketpair()
    with theirs:
        client = Qmp(ours)
        try:
            yield client, Peer(theirs)
        finally:
            await client.aclose()


async def both(*doing: Awaitable[Any]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*doing), 60)


async def test_a_command_gets_what_it_returned() -> None:
    async with pair() as (client, peer):
        peer.send(GREETING)
        _, capabilities = await both(client.start(), peer.answer(**{"return": {}}))
        found, command = await both(client.execute("query-status", {"a": 1}), peer.answer(**{"return": {"status": "running"}}))
    assert capabilities["execute"] == "qmp_capabilities"
    assert found == {"status": "running"} and command["arguments"] == {"a": 1}


async def test_commands_at_once_run_one_after_the_other_and_each_gets_its_own_answer() -> None:
    async with pair() as (client, peer):
        asked = [client.execute("echo", {"n": n}) for n in range(20)]

        async def serve() -> None:
            for _ in asked:
                command = await peer.asked()
                peer.send({"return": command["arguments"]["n"], "id": command["id"]})

        assert (await both(*asked, serve()))[:-1] == list(range(20))


async def test_a_refusal_says_why_and_the_next_command_is_served() -> None:
    async with pair() as (client, peer):
        refused = {"error": {"class": "GenericError", "desc": "no such thing"}}
        with pytest.raises(QmpFault, match="no such thing"):
            await both(client.execute("x"), peer.answer(**refused))
        assert (await both(client.execute("y"), peer.answer(**{"return": 1})))[0] == 1


async def test_a_late_answer_is_not_taken_for_the_next_command_s() -> None:
    async with pair() as (client, peer):
        with pytest.raises(QmpFault, match="no answer to slow"):
            await client.execute("slow", deadline_s=0.01)
        late = await peer.asked()
        peer.send({"return": "late", "id": late["id"]})
        assert (await both(client.execute("next"), peer.answer(**{"return": "next"})))[0] == "next"


async def test_a_command_that_was_cancelled_leaves_the_client_usable() -> None:
    async with pair() as (client, peer):
        asked = asyncio.create_task(client.execute("slow"))
        await peer.asked()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (await both(client.execute("next"), peer.answer(**{"return": "next"})))[0] == "next"


async def test_descriptors_go_along(tmp_path: Path) -> None:
    async with pair() as (client, peer):
        with (tmp_path / "file").open("w") as file:

            async def serve() -> None:
                while True:
                    with contextlib.suppress(BlockingIOError):
                        data, (fd,), *_ = socket.recv_fds(peer.socket, 1 << 16, 4)
                        break
                    await asyncio.sleep(0)
                os.write(fd, b"by the peer")
                os.close(fd)
                peer.send({"return": {}, "id": json.loads(data)["id"]})

            await both(client.execute("getfd", {"fdname": "x"}, fds=(file.fileno(),)), serve())
        assert (tmp_path / "file").read_text() == "by the peer"


async def test_an_expected_event_is_remembered_and_others_are_dropped() -> None:
    async with pair() as (client, peer):
        client.expect("RESUME")
        peer.send(*({"event": f"OTHER{n}", "data": {}} for n in range(1000)), {"event": "RESUME"}, {"event": "RESUME"})
        await client.happened("RESUME", 60)
        assert (await both(client.execute("next"), peer.answer(**{"return": "next"})))[0] == "next"
        client.expect("STOP")
        with pytest.raises(QmpFault, match="no STOP within"):
            await client.happened("STOP", 0.01)


@pytest.mark.parametrize("said", [b"", b"\n\n", {"event": "X"}, GREETING])
async def test_who_never_answers_is_left_at_the_deadline(said: Any) -> None:
    async with pair() as (client, peer):
        peer.send(said)
        with pytest.raises(QmpFault, match="within"):
            await client.start(deadline_s=0.05)


BROKEN: dict[str, Any] = {
    "no JSON": b"{]\n", "no object": [1], "nothing known": {"x": 1}, "two kinds": {"return": 1, "error": {"desc": ""}, "id": 1},
    "no id": {"return": 1}, "id of another type": {"return": 1, "id": True}, "id never given": {"return": 1, "id": 7},
    "id of nobody": {"return": 1, "id": 0}, "error that is no object": {"error": 1, "id": 1},
    "error without description": {"error": {"desc": 1}, "id": 1}, "event without a name": {"event": 1},
    "deep": b"[" * 40_000 + b"\n", "number": b'{"return":' + b"9" * 6000 + b',"id":1}\n',
    "no UTF-8": b'{"return":"\xff","id":1}\n',
    "long line": b" " * (LINE_BYTES + 1), "long line with an end": b'"' + b"x" * LINE_BYTES + b'"\n',
}  # fmt: skip


@pytest.mark.parametrize("said", BROKEN.values(), ids=BROKEN)
async def test_a_breach_of_the_protocol_fails_all_that_wait_and_all_that_come(said: Any) -> None:
    async with pair() as (client, peer):
        client.expect("STOP")
        asked = asyncio.create_task(client.execute("x"))
        await peer.asked()
        await asyncio.get_running_loop().sock_sendall(
            peer.socket, said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n"
        )
        for failed in (asked, client.happened("STOP"), client.execute("y")):
            with pytest.raises(QmpFault) as fault:
                await asyncio.wait_for(failed, 60)
            assert not isinstance(fault.value, QmpEnded)
        client.expect("RESUME")
        with pytest.raises(QmpFault):
            await asyncio.wait_for(client.happened("RESUME"), 60)


async def test_an_end_fails_all_that_wait() -> None:
    async with pair() as (client, peer):
        asked = asyncio.create_task(client.execute("x"))
        await peer.asked()
        peer.socket.close()
        with pytest.raises(QmpEnded, match="ended"):
            await asyncio.wait_for(asked, 60)
        with pytest.raises(QmpEnded, match="ended"):
            await client.execute("y")


async def test_a_closed_client_fails_who_waits_and_can_be_closed_again() -> None:
    async with pair() as (client, peer):
        asked = asyncio.create_task(client.execute("x"))
        await peer.asked()
        await client.aclose()
        with pytest.raises(QmpFault):
            await asyncio.wait_for(asked, 60)
        await client.aclose()


@given(
    st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b"")), max_size=9), st.lists(st.integers(0, 500), max_size=9)
)
def test_lines_come_out_as_they_went_in_wherever_the_bytes_are_split(sent: list[bytes], cuts: list[int]) -> None:
    data, lines, found, start = b"".join(line + b"\n" for line in sent), Lines(), list[bytes](), 0
    for end in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
        found += lines.feed(data[start:end])
        start = end
    assert found == [line for line in sent if line.strip()]


@given(st.binary(max_size=200) | messages.map(lambda m: json.dumps(m).encode()))
@settings(max_examples=300, deadline=None)
def test_a_line_is_a_message_of_one_kind_or_a_fault(line: bytes) -> None:
    try:
        message = qmp.decode(line)
    except QmpFault:
        return
    assert len({"QMP", "return", "error", "event"} & set(message)) == 1


hostile = st.lists(st.binary(max_size=100) | messages.map(lambda m: json.dumps(m).encode() + b"\n"), max_size=6).map(b"".join)


@given(hostile, st.booleans())
@settings(max_examples=100, deadline=None)
def test_whatever_a_peer_says_a_command_ends_with_its_answer_or_a_fault(said: bytes, ends: bool) -> None:
    async def ask(work: Callable[[Qmp], Awaitable[Any]]) -> None:
        async with pair() as (client, peer):
            peer.send(said)
            if ends:
                peer.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(QmpFault):
                await asyncio.wait_for(work(client), 60)
            assert not client._answers  # pyright: ignore[reportPrivateUsage]

    async def ask_twice() -> None:
        works = (lambda client: client.execute("x", deadline_s=0.01)), (lambda client: client.start(deadline_s=0.01))
        await asyncio.gather(*map(ask, works))

    asyncio.run(ask_twice())
