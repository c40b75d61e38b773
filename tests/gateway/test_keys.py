"""Who is let in at all: keys, their scopes, their end."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from callers import WAIT_S, client, eventually, new_key, problem, socket
from websockets.exceptions import ConnectionClosed, InvalidStatus

from http_server import Serving

REVOKED_S = 2.0
STRANGERS = {
    "nothing": {},
    "an empty key": {"x-api-key": ""},
    "nonsense": {"x-api-key": "nonsense"},
    "a placeholder (H14)": {"authorization": "Bearer changeme"},
    "a key that nobody has": {"authorization": "Bearer fh_" + "0" * 64},
    "bytes": {"x-api-key": b"\xff\xfe"},
    "another scheme": {"authorization": "Basic Zm9vOmJhcg=="},
    "a very long one": {"x-api-key": "fh_" + "a" * 4_000},
}
ADMIN_ONLY = [("GET", "/metrics"), ("GET", "/v1/status"), ("GET", "/v1/keys"), ("POST", "/v1/keys")]


def told(http: httpx.Client, method: str, path: str, headers: dict[str, str]) -> dict[str, object]:
    answer = http.request(method, path, headers=headers)
    assert answer.headers["www-authenticate"].startswith("Bearer")
    return {**problem(answer, 401, "unauthenticated"), "request_id": ""}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_who_has_no_key_hears_the_same_of_every_path_there_is_or_is_not(server: Serving, stranger: str, box: str) -> None:
    with httpx.Client(base_url=server.url) as http:
        asked = [("GET", "/v1/whoami"), ("GET", box), ("GET", "/nothing"), ("DELETE", box), ("POST", "/v1/run")]
        answers = [told(http, method, path, STRANGERS[stranger]) for method, path in [*asked, ("GET", "/mcp")]]
    assert all(answer == answers[0] for answer in answers)


def test_malformed_unknown_wrong_and_revoked_keys_are_told_the_same(server: Serving, admin: httpx.Client) -> None:
    good, gone = new_key(admin, "alice"), new_key(admin, "alice")
    admin.delete(f"/v1/keys/{gone['id']}").raise_for_status()
    keys = ["nonsense", "fh_" + "0" * 64, good["api_key"][:-1] + "x", good["api_key"][:19] + "0" * 48, gone["api_key"]]
    with httpx.Client(base_url=server.url) as http:
        answers = [told(http, "GET", "/v1/whoami", {"x-api-key": key}) for key in keys]
    assert all(answer == answers[0] for answer in answers)


def test_a_socket_without_a_key_is_refused_before_it_opens(server: Serving, box: str) -> None:
    with client(server, "nonsense") as http, pytest.raises(InvalidStatus) as refused:
        socket(http, f"{box}/processes")
    assert refused.value.response.status_code == 401


def test_a_key_is_shown_either_way_and_with_the_prefix_of_e2b(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice")["api_key"]
    forms = [{"x-api-key": key}, {"authorization": f"Bearer {key}"}, {"authorization": f"bearer {key}"}]
    with httpx.Client(base_url=server.url) as http:
        for form in [*forms, {"x-api-key": key.replace("fh_", "e2b_")}]:
            assert http.get("/v1/whoami", headers=form).raise_for_status().json()["tenant"] == "alice"


def test_a_revoked_key_is_refused_within_two_seconds(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice")
    with client(server, key["api_key"]) as http:
        http.get("/v1/whoami").raise_for_status()
        assert admin.delete(f"/v1/keys/{key['id']}").status_code == 204
        eventually(lambda: http.get("/v1/whoami").status_code == 401, REVOKED_S)
    problem(admin.delete(f"/v1/keys/{key['id']}"), 404, "not_found")


def test_what_a_revoked_key_has_open_is_closed(server: Serving, admin: httpx.Client) -> None:
    key = new_key(admin, "alice")
    with client(server, key["api_key"]) as http:
        box = f"/v1/sandboxes/{http.post('/v1/sandboxes', json={}).raise_for_status().json()['id']}"
        with socket(http, f"{box}/processes") as shell, http.stream("GET", "/v1/events") as stream:
            shell.send(json.dumps({"argv": ["/bin/cat"], "stdin": True}))
            assert "started" in str(shell.recv(WAIT_S))
            heard = stream.iter_lines()
            assert next(heard) == ": listening"
            admin.delete(f"/v1/keys/{key['id']}").raise_for_status()
            with pytest.raises(ConnectionClosed) as closed:
                shell.recv(WAIT_S)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
            with pytest.raises(httpx.RemoteProtocolError):
                list(heard)
    with client(server, new_key(admin, "alice")["api_key"]) as http:
        http.delete(box).raise_for_status()


@pytest.mark.parametrize(("method", "path"), ADMIN_ONLY)
def test_a_key_without_admin_gets_nowhere_that_is_for_admins(alice: httpx.Client, method: str, path: str) -> None:
    problem(alice.request(method, path, json={} if method == "POST" else None), 403, "forbidden")


def test_a_key_without_admin_revokes_none_and_hears_nothing_of_others(alice: httpx.Client, admin: httpx.Client) -> None:
    other = new_key(admin, "alice")
    problem(alice.delete(f"/v1/keys/{other['id']}"), 403, "forbidden")
    problem(alice.get("/v1/events", params={"all": "true"}), 403, "forbidden")
    assert other["id"] in {key["id"] for key in admin.get("/v1/keys").json()["keys"]}


def test_the_secret_of_a_key_is_in_one_answer_and_nowhere_else(admin: httpx.Client) -> None:
    key = new_key(admin, "alice", name="ci")
    listed = admin.get("/v1/keys", params={"tenant": "alice"})
    assert key["api_key"][19:] not in listed.text and "digest" not in listed.text + str(key)
    assert {"id": key["id"], "name": "ci", "tenant": "alice"}.items() <= {k["id"]: k for k in listed.json()["keys"]}[
        key["id"]
    ].items()


@pytest.mark.parametrize("limits", ['{"burst": 1e999}', '{"sandboxes": NaN}', '{"priority": 1e300}', '{"burst": "1"}'])
def test_limits_of_a_key_are_numbers_that_there_are(admin: httpx.Client, limits: str) -> None:
    body = f'{{"tenant": "alice", "limits": {limits}}}'
    problem(admin.post("/v1/keys", content=body, headers={"content-type": "application/json"}), 422, "invalid_input")


@pytest.mark.parametrize("limits", [{"burst": 0}, {"requests_per_s": 0}, {"sandboxes": -1}, {"priority": 11}, {"teapots": 1}])
def test_a_key_can_not_be_made_with_limits_that_mean_nothing(admin: httpx.Client, limits: dict[str, int]) -> None:
    problem(admin.post("/v1/keys", json={"tenant": "alice", "limits": limits}), 422, "invalid_input")


def test_health_and_the_document_need_no_key(server: Serving) -> None:
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/healthz").json() == http.get("/readyz").json() == {"status": "ok"}
        assert http.get("/openapi.json").json()["info"]["title"] == "fumehood"


def test_a_request_id_is_taken_over_only_if_it_is_harmless(alice: httpx.Client) -> None:
    assert alice.get("/v1/whoami", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 65, "é".encode(), "<script>"):
        shown = alice.get("/nothing", headers={"x-request-id": bad})
        assert problem(shown, 404, "not_found")["request_id"].isalnum()


def test_keys_made_at_the_same_moment_are_different(admin: httpx.Client) -> None:
    before = time.time()
    made = [new_key(admin, "alice") for _ in range(5)]
    assert len({key["api_key"] for key in made}) == len({key["id"] for key in made}) == 5
    assert all(before <= key["created_at"] <= time.time() for key in made)
