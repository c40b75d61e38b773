"""Ids, paths and queries that are wrong (H14; issue 3, "Bad input"): a typed problem each, on every route that there is."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from callers import WAIT_S, run

from http_server import Serving

TRAVERSALS = (
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "..",
    "%00",
    "s%00",
    "%ff%fe",
    "%ed%a0%80",
    "s'%3b%20drop%20table%20sandboxes%3b--",
    "x" * 4_000,
    "%0d%0aset-cookie:%20a=b",
    "-1",
    "9" * 400,
    "%25",
    "*",
    "\\..\\..",
)
QUERIES = ("limit=0", "limit=1001", "limit=x", "limit=", "state=bogus", "state=%00", "after=%ff", "after=" + "x" * 3_000)
NUMBERS = (
    "offset=-1",
    "length=-1",
    "offset=x",
    "offset=" + "9" * 400,
    "length=1e3",
    "depth=0",
    "depth=65",
    "mode=-1",
    "mode=999",
)


def raw(server: Serving, method: str, target: str, key: str) -> tuple[int, dict[str, Any], str]:
    """Exactly this target: a proper client would put it right. Status, headers, and what is said."""
    connection = http.client.HTTPConnection(*server.url.removeprefix("http://").split(":"), timeout=WAIT_S)
    try:
        headers = {"x-api-key": key, "content-type": "application/json"}
        connection.request(method, target, body=b"{}" if method in ("POST", "PUT", "PATCH") else None, headers=headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()
    finally:
        connection.close()


def refused(said: tuple[int, dict[str, Any], str], target: str) -> None:
    status, headers, text = said
    assert 400 <= status < 500, (target, said)
    assert headers["content-type"] == "application/problem+json" and "set-cookie" not in headers, (target, said)
    assert json.loads(text)["status"] == status and "root:" not in text, (target, said)


def operations(http: httpx.Client) -> list[tuple[str, str]]:
    paths = http.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, asked in paths.items() for method in asked if "{" in path]


@pytest.mark.parametrize("name", ["sandbox_id", "execution_id", "context", "pid", "key_id", "name", "token", "snapshot_id"])
def test_an_id_that_is_none_is_refused_on_every_route(server: Serving, admin: httpx.Client, name: str) -> None:
    made = admin.post("/v1/sandboxes", json={}).raise_for_status().json()["id"]
    good = {"sandbox_id": made, "execution_id": "e" + "0" * 24, "snapshot_id": "p" + "0" * 16}
    good |= {"context": "python", "pid": "1", "key_id": "0" * 16}
    found = [route for route in operations(admin) if f"{{{name}}}" in route[1]]
    assert found
    for method, path in found:
        for bad in TRAVERSALS:
            target = path.format(**{**good, "name": "default", "token": "x", name: bad})
            said = raw(server, method, target, admin.headers["x-api-key"])
            refused(said, f"{method} {target}")
    admin.delete(f"/v1/sandboxes/{made}").raise_for_status()


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_that_is_wrong_is_refused_or_finds_nothing(server: Serving, alice: httpx.Client, query: str) -> None:
    for path in ("/v1/sandboxes", "/v1/executions", "/v1/snapshots"):
        said = raw(server, "GET", f"{path}?{query}", alice.headers["x-api-key"])
        if said[0] != 200:
            refused(said, query)


@pytest.mark.parametrize("query", NUMBERS)
def test_a_number_that_is_none_is_refused(server: Serving, alice: httpx.Client, box: str, query: str) -> None:
    method, end = ("PUT", "") if "mode" in query else ("GET", "/list" if "depth" in query else "")
    refused(raw(server, method, f"{box}/files{end}?path=x&{query}", alice.headers["x-api-key"]), query)


@pytest.mark.parametrize("query", ["", "path=", "path=%00", "path=a%00b", "path=" + "x" * 5_000, "path=" + "x/" * 30_000])
def test_a_path_that_can_name_no_file_is_refused(server: Serving, alice: httpx.Client, box: str, query: str) -> None:
    for method, end in (("GET", ""), ("PUT", ""), ("DELETE", ""), ("GET", "/stat"), ("GET", "/list")):
        refused(raw(server, method, f"{box}/files{end}?{query}", alice.headers["x-api-key"]), query[:40])


def test_too_many_fields_of_a_query_are_refused(server: Serving, alice: httpx.Client, box: str) -> None:
    query = "path=x" + "".join(f"&a{n}=1" for n in range(100))
    refused(raw(server, "GET", f"{box}/files?{query}", alice.headers["x-api-key"]), "100 fields")


def test_no_path_leads_to_a_file_of_the_host(alice: httpx.Client, box: str, tmp_path: Path) -> None:
    """H12: it is looked up inside, where neither `..` nor a link leads out."""
    (canary := tmp_path / "canary").write_text("of the host")
    run(alice, box, f"import os; os.symlink({str(canary)!r}, 'link'); os.symlink('/proc/1/root', 'out')")
    for path in (str(canary), "../" * 20 + str(canary), "link", f"out{canary}", f"/proc/1/root{canary}", f"//{canary}"):
        answer = alice.get(f"{box}/files", params={"path": path})
        assert answer.status_code in (404, 409) and "of the host" not in answer.text, path
    wrote = alice.put(f"{box}/files", params={"path": str(tmp_path / "written")}, content=b"x")
    assert wrote.status_code in (200, 404, 409) and not (tmp_path / "written").exists()


def test_names_that_are_no_unicode_are_names_all_the_same(server: Serving, alice: httpx.Client, box: str) -> None:
    key, target = alice.headers["x-api-key"], f"{box}/files?path=caf%e9%0a"
    assert raw(server, "PUT", target, key)[0] == 200
    assert raw(server, "GET", target, key)[0] == 200
    listed = json.loads(raw(server, "GET", f"{box}/files/list?path=.", key)[2])["entries"]
    assert "caf\udce9\n" in {entry["name"] for entry in listed}
    moved = json.dumps({"source": "caf\udce9\n", "destination": "plain"}).encode()
    alice.post(f"{box}/files/move", content=moved, headers={"content-type": "application/json"}).raise_for_status()
    assert raw(server, "GET", f"{box}/files?path=plain", key)[0] == 200


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "POST", "OPTIONS", "TRACE"])
def test_a_path_or_a_method_that_there_is_not_is_a_problem(server: Serving, alice: httpx.Client, method: str) -> None:
    key = alice.headers["x-api-key"]
    for path in ("/", "/v1", "/v1/nothing", "//v1/whoami", "/v1/whoami/", f"/{quote('ü')}", "/v1/run/x"):
        refused(raw(server, method, path, key), f"{method} {path}")
    status, headers, _ = raw(server, method, "/v1/whoami", key)
    assert method == "GET" or (status == 405 and "GET" in headers["allow"])
