"""What holds around E2B's protocol: whose request it is, how much a key may ask, what is done once, what is left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2b_code_interpreter import Sandbox
from e2b_server import HEADER_TIMEOUT_S, Server, eventually

from e2b import RateLimitException, SandboxException

Make = Callable[..., Sandbox]
UNKNOWN = "s0000000000000000"
POSTED = ("pause", "connect", "resume", "fork", "snapshots")


def token_of(box: Sandbox) -> str:
    return box._envd_access_token or ""


# -- whose request it is
def test_a_sandbox_is_found_by_host_name_and_by_headers_over_a_plain_socket(box: Sandbox, server: Server) -> None:
    by_host = server.raw("GET /health", host=f"49983-{box.sandbox_id}.example.test", x_access_token=token_of(box))
    aim = {"e2b_sandbox_id": box.sandbox_id, "e2b_sandbox_port": "49983"}
    by_headers = server.raw("GET /health", **aim, x_access_token=token_of(box))
    assert by_host == by_headers and by_host.startswith(b"HTTP/1.1 204 ")
    other = server.raw("GET /", host=f"8000-{box.sandbox_id}.example.test", x_access_token=token_of(box))
    assert other.startswith(b"HTTP/1.1 502 ") and b"port is not open" in other


def test_no_host_name_of_a_sandbox_leads_to_our_own_api(box: Sandbox, server: Server) -> None:
    for sandbox_id in (box.sandbox_id, UNKNOWN):
        answer = server.raw(
            "GET /v1/sandboxes",
            host=f"49983-{sandbox_id}.example.test",
            authorization=f"Bearer {server.keys['alpha']}",
        )
        assert answer.startswith(b"HTTP/1.1 502 ") and b"was not found" in answer


@pytest.mark.parametrize("method_and_path", ["GET /health", "GET /files?path=a", "POST /process.Process/List", "POST /execute"])
@pytest.mark.parametrize("port", ["49983", "49999", "8000"])
def test_a_sandbox_of_another_tenant_is_answered_byte_for_byte_like_none_h14(
    box: Sandbox, foreign: Sandbox, server: Server, method_and_path: str, port: str
) -> None:
    secrets = {"x_access_token": token_of(foreign), "e2b_traffic_access_token": foreign.traffic_access_token or ""}
    secrets["x_api_key"] = server.keys["beta"]

    def by_headers(sandbox_id: str) -> bytes:
        return server.raw(method_and_path, e2b_sandbox_id=sandbox_id, e2b_sandbox_port=port, **secrets)

    def by_host(sandbox_id: str) -> bytes:
        return server.raw(method_and_path, host=f"{port}-{sandbox_id}.example.test", **secrets)

    for ask in (by_headers, by_host):
        assert ask(box.sandbox_id) == ask(UNKNOWN).replace(UNKNOWN.encode(), box.sandbox_id.encode())
        assert ask(box.sandbox_id).startswith(b"HTTP/1.1 502 ")


@pytest.mark.parametrize("prefix", ["", "/v2"])
@pytest.mark.parametrize("call", ["GET", "DELETE", *(f"POST /{verb}" for verb in POSTED), "GET /metrics", "PUT /network"])
def test_the_control_api_answers_so_too_h14(box: Sandbox, server: Server, prefix: str, call: str) -> None:
    method, _, verb = call.partition(" ")

    def ask(sandbox_id: str) -> bytes:
        return server.raw(f"{method} {prefix}/sandboxes/{sandbox_id}{verb}", x_api_key=server.keys["beta"])

    assert ask(box.sandbox_id) == ask(UNKNOWN).replace(UNKNOWN.encode(), box.sandbox_id.encode())
    assert ask(box.sandbox_id).startswith(b"HTTP/1.1 404 ")


@pytest.fixture(scope="module")
def foreign(server: Server) -> Any:
    sandbox = Sandbox.create(template="python", **server.options("beta"))
    yield sandbox
    sandbox.kill()


def test_every_key_may_be_shown_with_the_prefix_of_e2b_or_with_ours_h14(server: Server) -> None:
    for key in (server.admin_key, "e2b_" + server.admin_key.removeprefix("fh_")):
        assert Sandbox.list(**server.options(key)).next_items() == []
    ours = "fh_" + server.keys["alpha"].removeprefix("e2b_")
    assert httpx.get(server.url + "/v1/whoami", headers=server.headers(ours)).json()["tenant"] == "alpha"
    for wrong in ("e2b_fh_" + ours[3:], "E2B_" + ours[3:], ours[3:]):
        assert httpx.get(server.url + "/v2/sandboxes", headers=server.headers(wrong)).status_code == 401


# -- how much a key may ask
def test_a_key_that_asks_too_fast_is_told_so_once_and_its_sdk_does_not_ask_again(server: Server) -> None:
    key = server.new_key(tenant="alpha", limits={"requests_per_s": 0.01, "burst": 2})
    for _ in range(2):
        assert httpx.get(server.url + "/v2/sandboxes", headers=server.headers(key)).is_success
    refused = httpx.get(server.url + "/v2/sandboxes", headers=server.headers(key))
    assert refused.status_code == 429 and refused.json().keys() == {"code", "message"} and refused.json()["code"] == 429
    assert refused.headers["should-retry"] == "false" and 0 < int(refused.headers["retry-after"]) <= 100
    counted = 'fumehood_answers_total{code="429"}'
    before = server.figure(counted)
    with pytest.raises(RateLimitException, match="asks too much"):
        Sandbox.create(**server.options(key, retries=3))
    assert server.figure(counted) - before == 1


def test_what_a_key_has_under_way_is_counted_until_it_ends_or_its_client_goes_away(server: Server) -> None:
    key = server.new_key(tenant="alpha", limits={"concurrent_requests": 1})

    def status() -> int:
        return httpx.get(server.url + "/v2/sandboxes", headers=server.headers(key)).status_code

    assert [status() for _ in range(5)] == [200] * 5
    with server.connect() as connection:
        head = f"POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: {key}\r\ncontent-length: 9\r\n\r\n"
        connection.sendall(head.encode())
        eventually(lambda: status() == 429)
    eventually(lambda: status() == 200)


def test_a_key_holds_no_more_sandboxes_than_it_may(server: Server, make: Make) -> None:
    key = server.new_key(tenant="alpha", limits={"sandboxes": 1})
    held = make(**server.options(key))
    with pytest.raises(RateLimitException, match="may hold 1 sandboxes"):
        make(**server.options(key))
    held.kill()
    make(**server.options(key))


# -- what is done once
def test_a_creation_with_an_idempotency_key_is_done_once(server: Server, make: Make) -> None:
    before = server.figure("fumehood_sandboxes")
    first, again = (make(idempotency_key="one", metadata={"n": "1"}) for _ in range(2))
    assert (first.sandbox_id, token_of(first)) == (again.sandbox_id, token_of(again))
    assert server.figure("fumehood_sandboxes") - before == 1
    with pytest.raises(SandboxException, match="409"):
        make(idempotency_key="one", metadata={"n": "2"})
    other_key = server.new_key(tenant="alpha")
    assert make(idempotency_key="one", metadata={"n": "1"}, **server.options(other_key)).sandbox_id != first.sandbox_id
    first.kill()
    with pytest.raises(SandboxException, match="not found"):
        make(idempotency_key="one", metadata={"n": "1"})


def test_no_secret_of_a_sandbox_rests_on_the_disk(server: Server, make: Make) -> None:
    sandbox = make(idempotency_key="secret")
    assert make(idempotency_key="secret").sandbox_id == sandbox.sandbox_id  # so the first answer has been kept
    kept = b"".join(file.read_bytes() for file in (server.home / "state").rglob("*") if file.is_file())
    assert sandbox.sandbox_id.encode() in kept
    for secret in (token_of(sandbox), sandbox.traffic_access_token or "", server.keys["alpha"]):
        assert secret and secret.encode() not in kept


# -- what a refused client hears
def test_a_refusal_reaches_an_sdk_that_still_sends(box: Sandbox) -> None:
    """Its client takes an answer that overtakes its request for a broken connection, once in thirty times."""
    for _ in range(200):
        with pytest.raises(SandboxException, match="metadata is not kept"):
            box.files.write("m", "x", metadata={"a": "b"})


def test_a_refusal_is_told_to_who_never_sends_the_rest(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /v2/sandboxes HTTP/1.1\r\nhost: x\r\nx-api-key: none\r\ncontent-length: 9\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 401 ")


# -- streams
def test_a_run_whose_reader_stops_waits_for_it_and_the_server_holds_little_h15(server: Server, make: Make) -> None:
    sandbox, whole_mib = make(), 200
    code = f"for n in range({whole_mib}):\n    print('x' * (1 << 20))\n    open('/tmp/n', 'w').write(str(n))"
    body = json.dumps({"code": code})
    before = _resident_mib(server.pid)
    with server.connect() as connection:
        head = (
            f"POST /execute HTTP/1.1\r\nhost: 49999-{sandbox.sandbox_id}.x\r\ncontent-length: {len(body)}\r\n"
            f"e2b-traffic-access-token: {sandbox.traffic_access_token}\r\n\r\n"
        )
        connection.sendall((head + body).encode())
        assert connection.recv(1)
        assert _at_rest(lambda: _resident_mib(server.pid)) - before < whole_mib / 4
    assert int(sandbox.files.read("/tmp/n")) < whole_mib / 2, "the program went on without its reader"
    assert sandbox.run_code("'on'").text == "on"


def test_a_pause_in_what_is_typed_into_a_program_ends_nothing(server: Server, make: Make) -> None:
    sandbox = make()
    started = sandbox.commands.run("wc -c", background=True, stdin=True)

    def typed() -> Any:
        yield b"before"
        time.sleep(HEADER_TIMEOUT_S * 1.5)
        yield b"after"

    sandbox.commands.stream_input(started.pid, typed())
    sandbox.commands.close_stdin(started.pid)
    assert started.wait().stdout.strip() == "11"


def test_input_may_be_longer_than_a_json_body(box: Sandbox) -> None:
    started = box.commands.run("wc -c", background=True, stdin=True)
    box.commands.stream_input(started.pid, iter([b"x" * (1 << 20)] * 7))  # in base64 over 9 MiB
    box.commands.close_stdin(started.pid)
    assert started.wait().stdout.strip() == str(7 << 20)


def _at_rest(read: Callable[[], int], seconds: float = 30) -> int:
    """What `read` gives once it has stayed the same for a second."""
    until, last, since = time.monotonic() + seconds, read(), time.monotonic()
    while time.monotonic() - since < 1:
        assert time.monotonic() < until, "it never rests"
        time.sleep(0.05)
        if (now := read()) != last:
            last, since = now, time.monotonic()
    return last


def _resident_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) >> 10
    raise AssertionError("no VmRSS")
