"""Files over HTTP: streamed both ways, whole or not at all, and opened by a URL without a key."""

from __future__ import annotations

import hashlib
import socket as sockets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from callers import eventually, problem, run

from http_server import Serving

MIB = 1 << 20
BLOCK = hashlib.sha512(b"block").digest() * 1_024  # 64 KiB
LARGE = 64 * MIB


def at(path: str, **more: Any) -> dict[str, Any]:
    return {"params": {"path": path, **more}}


def exists(http: httpx.Client, box: str, path: str) -> bool:
    return http.get(f"{box}/files/stat", **at(path)).status_code == 200


def names(http: httpx.Client, box: str, path: str = ".") -> set[str]:
    return {entry["name"] for entry in http.get(f"{box}/files/list", **at(path)).raise_for_status().json()["entries"]}


@pytest.fixture
def roomy(alice: httpx.Client) -> Iterator[str]:
    """A sandbox with room for a large file."""
    made = alice.post("/v1/sandboxes", json={"limits": {"disk_bytes": "256MiB", "memory_bytes": "512MiB"}}).raise_for_status()
    path = f"/v1/sandboxes/{made.json()['id']}"
    yield path
    alice.delete(path)


def peak_bytes(server: Serving) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def test_64_mib_go_in_and_out_whole_and_never_rest_in_the_server(server: Serving, alice: httpx.Client, roomy: str) -> None:
    before = peak_bytes(server)
    pieces = (BLOCK for _ in range(LARGE // len(BLOCK)))
    entry = alice.put(f"{roomy}/files", **at("large"), content=pieces).raise_for_status().json()
    assert (entry["size"], entry["name"], entry["type"]) == (LARGE, "large", "file")
    digest, received = hashlib.sha256(), 0
    with alice.stream("GET", f"{roomy}/files", **at("large")) as answer:
        assert answer.headers["content-type"] == "application/octet-stream"
        for piece in answer.iter_bytes():
            digest.update(piece)
            received += len(piece)
    assert (received, digest.digest()) == (LARGE, hashlib.sha256(BLOCK * (LARGE // len(BLOCK))).digest())
    assert peak_bytes(server) - before < 32 * MIB


@pytest.mark.parametrize("reset", [False, True])
def test_an_upload_that_breaks_off_leaves_nothing(server: Serving, alice: httpx.Client, box: str, reset: bool) -> None:
    before = names(alice, box)
    host, port = server.url.removeprefix("http://").split(":")
    with sockets.create_connection((host, int(port))) as connection:
        head = f"PUT {box}/files?path=new HTTP/1.1\r\nhost: x\r\nx-api-key: {alice.headers['x-api-key']}\r\n"
        connection.sendall(f"{head}content-length: {MIB}\r\n\r\n".encode() + b"x" * (MIB // 2))
        eventually(lambda: names(alice, box) != before)
        if reset:
            connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    eventually(lambda: names(alice, box) == before)


def test_a_part_is_what_was_asked_for(alice: httpx.Client, box: str) -> None:
    alice.put(f"{box}/files", **at("f"), content=b"0123456789").raise_for_status()
    for part, found in (
        ({"offset": 3}, b"3456789"),
        ({"length": 3}, b"012"),
        ({"offset": 3, "length": 4}, b"3456"),
        ({"offset": 8, "length": 100}, b"89"),
        ({"offset": 10}, b""),
        ({"offset": 1 << 40}, b""),
        ({"length": 0}, b""),
    ):
        assert alice.get(f"{box}/files", **at("f", **part)).raise_for_status().content == found, part


def test_an_empty_file_is_a_file(alice: httpx.Client, box: str) -> None:
    assert alice.put(f"{box}/files", **at("empty")).raise_for_status().json()["size"] == 0
    answer = alice.get(f"{box}/files", **at("empty")).raise_for_status()
    assert (answer.content, answer.headers["content-type"]) == (b"", "application/octet-stream")


def test_files_live_and_move_and_die(alice: httpx.Client, box: str) -> None:
    alice.post(f"{box}/files/mkdir", json={"path": "d/e"}).raise_for_status()
    entry = alice.put(f"{box}/files", **at("d/e/f", mode=0o750), content=b"x").raise_for_status().json()
    assert entry["mode"] & 0o777 == 0o750 and entry == alice.get(f"{box}/files/stat", **at("d/e/f")).json()
    assert {e["name"] for e in alice.get(f"{box}/files/list", **at("d", depth=2)).json()["entries"]} == {"e", "f"}
    moved = alice.post(f"{box}/files/move", json={"source": "d/e/f", "destination": "g"}).raise_for_status().json()
    assert moved["name"] == "g" and not exists(alice, box, "d/e/f")
    assert alice.delete(f"{box}/files", **at("d")).status_code == 204 and not exists(alice, box, "d")


def test_what_is_not_there_is_404_and_what_can_not_be_done_says_why(alice: httpx.Client, box: str) -> None:
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/stat"), ("GET", "/list")):
        problem(alice.request(method, f"{box}/files{end}", **at("nothing")), 404, "not_found")
    problem(alice.post(f"{box}/files/move", json={"source": "nothing", "destination": "x"}), 404, "not_found")
    said = problem(alice.get(f"{box}/files", **at("/tmp")), 409, "file_error")
    assert said["details"]["errno"] == "EISDIR"
    said = problem(alice.put(f"{box}/files", **at("/usr/x"), content=b"x"), 409, "file_error")
    assert said["details"]["errno"] in ("EROFS", "EACCES")


def test_a_full_disk_is_507_and_leaves_no_part_of_the_file(alice: httpx.Client) -> None:
    made = alice.post("/v1/sandboxes", json={"limits": {"disk_bytes": "2MiB"}}).raise_for_status().json()
    path = f"/v1/sandboxes/{made['id']}"
    said = problem(alice.put(f"{path}/files", **at("large"), content=b"x" * (4 * MIB)), 507, "file_error")
    assert said["details"]["errno"] == "ENOSPC" and not exists(alice, path, "large")
    alice.put(f"{path}/files", **at("small"), content=b"x" * MIB).raise_for_status()
    alice.delete(path).raise_for_status()


def test_a_download_of_a_sandbox_that_ends_is_broken_off_not_cut_short(alice: httpx.Client, roomy: str) -> None:
    """A clean end would be taken for the whole file."""
    run(alice, roomy, "open('large', 'wb').truncate(200 << 20)")
    with pytest.raises(httpx.RemoteProtocolError), alice.stream("GET", f"{roomy}/files", **at("large")) as answer:
        pieces = answer.iter_bytes()
        next(pieces)
        alice.delete(roomy).raise_for_status()
        for _ in pieces:
            pass


def sign(http: httpx.Client, box: str, **asked: Any) -> str:
    return http.post(f"{box}/files/sign", json=asked).raise_for_status().json()["url"]


@pytest.fixture
def nobody(server: Serving) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as http:
        yield http


def test_a_signed_url_opens_one_file_for_one_method_without_a_key(alice: httpx.Client, nobody: httpx.Client, box: str) -> None:
    put, get = sign(alice, box, path="a b/é", method="PUT"), sign(alice, box, path="a b/é")
    alice.post(f"{box}/files/mkdir", json={"path": "a b"}).raise_for_status()
    assert nobody.put(put, content=b"signed").raise_for_status().json()["name"] == "é"
    assert nobody.get(get, params={"path": "/etc/passwd"}).raise_for_status().content == b"signed"
    for answer in (nobody.get(put), nobody.put(get, content=b"x")):
        problem(answer, 401, "unauthenticated")


def test_a_signed_url_that_was_changed_opens_nothing(alice: httpx.Client, nobody: httpx.Client, box: str) -> None:
    alice.put(f"{box}/files", **at("f"), content=b"x").raise_for_status()
    url, other = sign(alice, box, path="f"), sign(alice, box, path="g")
    head, _, tail = url.rpartition(".")
    wrong = [f"{head}.{tail[:-2]}AA", f"{head}.", head, f"{other.rpartition('.')[0]}.{tail}", f"{head[:-1]}.{tail}", f"{url}=="]
    said = [problem(nobody.get(each), 401, "unauthenticated") for each in [*wrong, "/v1/signed/x", "/v1/signed/bnVsbA.x"]]
    assert len({each["message"] + each["cause"] for each in said}) == 1
    assert nobody.get(url).content == b"x"


def test_a_signed_url_expires(alice: httpx.Client, nobody: httpx.Client, box: str) -> None:
    alice.put(f"{box}/files", **at("f"), content=b"x").raise_for_status()
    url = sign(alice, box, path="f", expires_s=0.01)
    assert nobody.get(url).status_code == 200
    eventually(lambda: nobody.get(url).status_code == 401)


def test_a_signed_url_dies_with_its_sandbox(alice: httpx.Client, nobody: httpx.Client, box: str) -> None:
    alice.put(f"{box}/files", **at("f"), content=b"x").raise_for_status()
    url = sign(alice, box, path="f")
    alice.delete(box).raise_for_status()
    problem(nobody.get(url), 401, "unauthenticated")


@pytest.mark.parametrize("asked", [{"method": "DELETE"}, {"expires_s": 0}, {"expires_s": 700_000}, {"expires_s": -1}])
def test_a_url_is_signed_for_what_it_can_be_and_not_for_ever(alice: httpx.Client, box: str, asked: dict[str, Any]) -> None:
    problem(alice.post(f"{box}/files/sign", json={"path": "f", **asked}), 422, "invalid_input")
