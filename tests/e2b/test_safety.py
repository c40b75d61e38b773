"""What a client of E2B's protocol must not be able to do here, whoever wrote it."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from e2b_code_interpreter import Sandbox
from e2b_server import UPLOAD_BYTES, Server

from e2b import AuthenticationException, NotFoundException, SandboxException, SandboxNotFoundException

Make = Callable[..., Sandbox]


def envd(box: Sandbox, token: str | None = None, sandbox_id: str | None = None, port: int = 49983) -> dict[str, str]:
    token = (box._envd_access_token or "") if token is None else token
    return {"E2b-Sandbox-Id": sandbox_id or box.sandbox_id, "E2b-Sandbox-Port": str(port), "X-Access-Token": token}


def gone(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["message"]


NOT_FOUND = (502, "The sandbox was not found")
CALLS = [
    ("GET", "/health", 49983),
    ("GET", "/files?path=/etc/passwd", 49983),
    ("POST", "/files?path=x", 49983),
    ("POST", "/process.Process/List", 49983),
    ("POST", "/process.Process/Start", 49983),
    ("POST", "/filesystem.Filesystem/ListDir", 49983),
    ("POST", "/execute", 49999),
    ("GET", "/contexts", 49999),
    ("GET", "/health", 49999),
]


# -- whose sandbox is it
@pytest.mark.parametrize(("method", "path", "port"), CALLS)
def test_no_request_gets_in_without_the_sandboxs_own_token_and_none_learns_that_it_exists_h14(
    box: Sandbox, make: Make, server: Server, method: str, path: str, port: int
) -> None:
    other = make()
    answers = [
        httpx.request(method, server.url + path, headers=headers)
        for headers in (
            envd(box, "", port=port),
            envd(box, "0" * 48, port=port),
            envd(box, other._envd_access_token, port=port),
            {**envd(box, "x", port=port), "E2B-Traffic-Access-Token": other.traffic_access_token or ""},
            envd(box, sandbox_id="s0000000000000000", port=port),
            {**envd(box, port=port), "E2b-Sandbox-Id": "../" + box.sandbox_id},
            {**envd(box, "", port=port), **server.headers()},
        )
    ]
    assert {gone(a) for a in answers} == {NOT_FOUND}
    bodies = {a.text.replace(box.sandbox_id, "ID").replace("s0000000000000000", "ID") for a in answers[:5]}
    assert len(bodies) == 1, "an id that exists must look like one that does not"


def test_the_traffic_token_opens_no_files_and_the_access_token_runs_no_code(box: Sandbox, server: Server) -> None:
    traffic = box.traffic_access_token or ""
    assert gone(httpx.get(server.url + "/files?path=a", headers=envd(box, traffic))) == NOT_FOUND
    assert gone(httpx.get(server.url + "/contexts", headers=envd(box, port=49999))) == NOT_FOUND
    assert httpx.get(
        server.url + "/contexts", headers={**envd(box, port=49999), "E2B-Traffic-Access-Token": traffic}
    ).is_success


def test_a_key_of_another_tenant_sees_nothing_h14(box: Sandbox, server: Server) -> None:
    foreign = server.options("beta")
    unknown = "s0000000000000000"
    assert box.sandbox_id not in [s.sandbox_id for s in Sandbox.list(**foreign).next_items()]
    for call in (Sandbox.get_info, Sandbox.connect, Sandbox.get_metrics):
        with pytest.raises(SandboxNotFoundException):
            call(box.sandbox_id, **foreign)
    assert not Sandbox.kill(box.sandbox_id, **foreign)
    for method, verb in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/pause"),
        ("POST", "/timeout"),
        ("PUT", "/network"),
        ("POST", "/fork"),
        ("POST", "/snapshots"),
    ):
        answers = [
            httpx.request(method, f"{server.url}/sandboxes/{i}{verb}", headers=server.headers("beta"), json={"timeout": 1})
            for i in (box.sandbox_id, unknown)
        ]
        assert answers[0].status_code == 404 and answers[0].text == answers[1].text.replace(unknown, box.sandbox_id)
    assert box.is_running()


@pytest.mark.parametrize("key", ["", "e2b_00", "e2b_" + "0" * 64])
def test_no_key_no_answer_h14(server: Server, key: str) -> None:
    for path in ("/sandboxes", "/v2/sandboxes", "/sandboxes/s1", "/templates/aliases/base", "/v3/templates", "/snapshots"):
        answer = httpx.get(server.url + path, headers={"X-API-Key": key} if key else {})
        assert (answer.status_code, answer.json()["code"]) == (401, 401)
    with pytest.raises(AuthenticationException):
        Sandbox.create(**server.options("e2b_" + "0" * 64))


# -- signed addresses
def test_a_signed_address_reads_and_writes_its_own_path_and_nothing_else(box: Sandbox, server: Server) -> None:
    box.files.write("signed.txt", "content")
    read = box.download_url("signed.txt")
    assert httpx.get(read).text == "content"
    assert httpx.get(box.download_url("signed.txt", use_signature_expiration=60)).text == "content"
    write = box.upload_url("signed.txt", use_signature_expiration=60)
    assert httpx.post(write, files={"file": ("ignored", b"changed")}).is_success
    assert box.files.read("signed.txt") == "changed"
    for forged in (read.replace("signed.txt", "other.txt"), read + "x", read + "&signature_expiration=99999999999"):
        assert httpx.get(forged).json() == {"code": 401, "message": "invalid signature"}
    assert httpx.post(read, files={"file": ("signed.txt", b"no")}).status_code == 401, "reading is not writing"
    assert httpx.get(write).status_code == 401


def test_a_signed_address_ends_with_its_time_and_with_its_sandbox(make: Make, server: Server) -> None:
    sandbox = make()
    sandbox.files.write("f", "x")
    old = httpx.get(sandbox.download_url("f", use_signature_expiration=-1))
    assert (old.status_code, old.json()["message"]) == (401, "signature is already expired")
    url = sandbox.download_url("f")
    sandbox.kill()
    assert httpx.get(url).status_code == 401


# -- the network
@pytest.mark.parametrize(
    "ask",
    [
        {"allow_internet_access": True},
        {"network": {"allow_out": ["1.1.1.1"]}},
        {"network": {"allow_out": ["example.com"], "deny_out": ["0.0.0.0/0"]}},
        {"network": {"rules": {"example.com": [{"transform": {"headers": {"a": "b"}}}]}}},
    ],
)
def test_who_asks_for_the_internet_is_told_that_there_is_none_h9(make: Make, ask: dict[str, Any]) -> None:
    with pytest.raises(SandboxException, match=r"400: sandboxes here have no network at all.*ignore-egress"):
        make(**ask)


def test_with_the_switch_the_ask_is_taken_and_the_network_stays_closed_h9(make: Make, server: Server) -> None:
    sandbox = make(allow_internet_access=True, **server.options("knowing"))
    assert sandbox.get_info().allow_internet_access is False
    run = sandbox.run_code("import socket\nsocket.create_connection(('1.1.1.1', 53), 2)")
    assert run.error is not None and "no network" in run.error.traceback
    with pytest.raises(SandboxException, match="no network at all"):
        Sandbox.update_network(sandbox.sandbox_id, {"allow_out": ["1.1.1.1"]}, **server.options())
    Sandbox.update_network(sandbox.sandbox_id, {"deny_out": ["0.0.0.0/0"]}, **server.options())


# -- the user
def test_root_is_refused_by_name_everywhere(box: Sandbox) -> None:
    for call in (
        lambda: box.commands.run("id", user="root"),
        lambda: box.files.read("/etc/passwd", user="root"),
        lambda: box.files.write("x", "y", user="root"),
        lambda: box.files.list("/", user="root"),
        lambda: box.files.make_dir("/tmp/r", user="root"),
    ):
        with pytest.raises(AuthenticationException, match="there is no root"):
            call()
    assert box.commands.run("id -un", user="user").stdout == "user\n"


# -- paths and bodies
@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "/proc/1/environ", "/proc/1/root/etc/shadow", "/dev/zero"])
def test_no_path_leads_to_a_file_of_the_host_h12(box: Sandbox, server: Server, path: str) -> None:
    mark = b"root:x:0:0:root:/root:/bin/bash"
    answer = httpx.get(server.url + "/files", params={"path": path}, headers=envd(box))
    assert answer.status_code in (200, 400, 403, 404) and mark not in answer.content


def test_a_link_that_the_guest_planted_is_followed_inside_only_h12(box: Sandbox) -> None:
    box.commands.run("ln -sf /root/secret planted; ln -sfn / everything")
    with pytest.raises(NotFoundException):
        box.files.read("planted")
    with pytest.raises(SandboxException):
        box.files.write("everything/etc/planted", "x")


def test_uploads_are_bounded_by_what_they_come_to_h15(box: Sandbox, server: Server) -> None:
    url, headers = server.url + "/files?path=bomb", envd(box)
    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < 100_000
    kind = {"Content-Type": "application/octet-stream"}
    answer = httpx.post(url, content=bomb, headers={**headers, **kind, "Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["code"]) == (413, 413)
    answer = httpx.post(url, content=bytes(UPLOAD_BYTES + 1), headers={**headers, **kind})
    assert answer.status_code == 413
    assert not box.files.exists("bomb"), "half of a new file is worse than none"
    for content in (b"no gzip", bomb[:-10], bomb[:1000] + bomb):
        answer = httpx.post(url, content=content, headers={**headers, **kind, "Content-Encoding": "gzip"})
        assert answer.status_code in (400, 413)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("multipart/form-data", b"--x\r\n\r\n"),
        ("multipart/form-data; boundary=x", b"no part"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\nno name\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; filename="cut"\r\n\r\nof'),
        ("application/json", b"{}"),
    ],
)
def test_a_malformed_upload_is_the_clients_fault_and_leaves_nothing(
    box: Sandbox, server: Server, kind: str, content: bytes
) -> None:
    answer = httpx.post(server.url + "/files", content=content, headers={**envd(box), "Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["code"] == 400
    assert not box.files.exists("cut")


def test_a_full_disk_is_said_by_its_name(make: Make, server: Server) -> None:
    from e2b import NotEnoughSpaceException

    sandbox = make()
    sandbox.commands.run("head -c 250M /dev/zero > ballast; true")
    with pytest.raises(NotEnoughSpaceException):
        sandbox.files.write("more", bytes(7 << 20))


# -- the control API's words
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/sandboxes/..%2fetc", 404),
        ("GET", "/sandboxes/%2e%2e%2fx", 404),
        ("GET", "/sandboxes/S1", 404),
        ("PATCH", "/sandboxes", 405),
        ("GET", "/v2/nothing", 404),
        ("POST", "/v3/templates", 404),
        ("GET", "/volumes", 404),
        ("GET", "/v2/sandboxes?limit=0", 400),
        ("GET", "/v2/sandboxes?limit=99999", 400),
        ("GET", "/v2/sandboxes?nextToken=x", 400),
        ("GET", "/v2/sandboxes?startedAfter=never", 400),
        ("DELETE", "/templates/a%2Fb%3Ac", 404),
        ("GET", "/templates/aliases/none", 404),
        ("POST", "/v2/sandboxes", 400),
    ],
)
def test_every_refusal_is_json_with_its_code(server: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path, headers=server.headers())
    assert (answer.status_code, answer.json()["code"]) == (status, status) and answer.json()["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"[" * 100_000,
        b'{"templateID": 5}',
        b'{"templateID":"base","timeout":"x"}',
        b'{"templateID":"base","timeout":0}',
        b'{"templateID":"base","timeout":1e999}',
        b'{"templateID":"base","metadata":{"a":1}}',
        b'{"templateID":"python","envVars":{"":"x"}}',
        b'{"templateID":"python","envVars":{"A":"\\u0000"}}',
        b'{"templateID":"base","mcp":{"a":1}}',
        b'{"templateID":"base","autoPauseMemory":false}',
    ],
)
def test_a_bad_creation_makes_nothing(server: Server, body: bytes) -> None:
    before = server.figure("fumehood_sandboxes")
    answer = httpx.post(server.url + "/v2/sandboxes", content=body, headers=server.headers())
    assert answer.status_code == 400 and answer.json()["code"] == 400
    assert server.figure("fumehood_sandboxes") == before


def test_bodies_over_the_limit_are_refused_as_they_arrive(server: Server, box: Sandbox) -> None:
    answer = httpx.post(server.url + "/v2/sandboxes", content=b" " * (9 << 20), headers=server.headers())
    assert answer.status_code == 413
    headers = {**envd(box), "Content-Type": "application/json"}
    answer = httpx.post(server.url + "/filesystem.Filesystem/Stat", content=b" " * (5 << 20), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")


def test_requests_to_the_rest_of_the_gateway_pass_by(server: Server) -> None:
    assert httpx.get(server.url + "/healthz").json() == {"status": "ok"}
    assert "sandboxes" in httpx.get(server.url + "/v1/sandboxes", headers=server.headers()).json()
    for path in ("/", "/files", "/sandboxesx", "/v2", "/templatesx/a"):
        answer = httpx.get(server.url + path, headers=server.headers())
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json"), path


def test_a_body_that_is_read_as_a_whole_has_the_bound_of_json_whatever_its_method(box: Sandbox, server: Server) -> None:
    url, large = f"{server.url}/sandboxes/{box.sandbox_id}/network", (8 << 20) + 1
    assert large < UPLOAD_BYTES, "or it is refused as an upload"
    answer = httpx.put(url, content=b" " * large, headers=server.headers(), timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (413, "invalid_input")
    assert httpx.put(url, content=b"{}", headers=server.headers()).status_code == 204


@pytest.mark.parametrize(("path", "port"), [("/filesystem.Filesystem/Stat", 49983), ("/contexts", 49999)])
def test_a_sandboxs_own_tokens_get_its_key_no_more_than_the_keys_limits(server: Server, path: str, port: int) -> None:
    key = server.new_key(tenant="alpha", limits={"requests_per_s": 0.05, "burst": 3})
    box = Sandbox.create(template="python", **server.options(key))
    try:
        shown = {**envd(box, port=port), "E2B-Traffic-Access-Token": box.traffic_access_token or ""}
        answers = [httpx.post(server.url + path, json={"path": "/"}, headers=shown) for _ in range(4)]
        assert answers[0].is_success and answers[-1].status_code == 429, [a.status_code for a in answers]
        assert answers[-1].json()["code"] == 429 and int(answers[-1].headers["retry-after"]) >= 1
        signed = httpx.get(box.download_url("nothing"))
        assert signed.status_code == 429
    finally:
        httpx.delete(f"{server.url}/v1/sandboxes/{box.sandbox_id}", headers={"X-API-Key": server.keys["alpha"]})
