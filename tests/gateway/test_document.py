"""/openapi.json says what the server does: by its words, and by what schemathesis makes of them against the real thing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, checks
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks as openapi_checks

from fumehood import errors
from fumehood.errors import FumehoodError
from http_server import Serving

SETTINGS = {"queue_wait_s": 2, "pool_floor": 3}
EXAMPLES = 6
# What can't hold here, and why:
NOT_HERE = [
    # 501, 503, 504 and 507 are answers of ours; that no 500 comes is asserted below, and that the log has nothing.
    checks.not_a_server_error,
    # No JSON Schema says which presets, languages, contexts, files and programs there are: a 404 or 422 is right for those.
    openapi_checks.positive_data_acceptance,
]


def living(admin: httpx.Client) -> str:
    """The one sandbox that there is, made anew when the last request ended it or put it to sleep."""
    boxes = admin.get("/v1/sandboxes").raise_for_status().json()["sandboxes"]
    for box in boxes[1:] if boxes and boxes[0]["state"] == "ready" else boxes:
        admin.delete(f"/v1/sandboxes/{box['id']}")
    if boxes and boxes[0]["state"] == "ready":
        return str(boxes[0]["id"])
    return str(admin.post("/v1/sandboxes", json={}).raise_for_status().json()["id"])


bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=True,
    phases=[Phase.generate],
)


def hold(admin: httpx.Client, case: Case) -> None:
    if case.meta.generation.mode is GenerationMode.POSITIVE and "sandbox_id" in case.path_parameters:
        case.path_parameters["sandbox_id"] = living(admin)
    answer = case.call_and_validate(headers={"X-API-Key": admin.headers["x-api-key"]}, excluded_checks=NOT_HERE, timeout=60)
    assert answer.status_code != 500 and "x-request-id" in answer.headers
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == ["application/problem+json"]


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_operation_does_what_the_document_says(server: Serving, admin: httpx.Client, mode: GenerationMode) -> None:
    config = SchemathesisConfig.from_dict({"generation": {"with-security-parameters": False}})  # hold() shows the key
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)
    for found in schema.exclude(path="/v1/events").get_all_operations():  # whose answer has no end
        if mode is GenerationMode.POSITIVE or found.ok().body:  # any text may stand in a path; test_bad_paths.py has queries
            cases = found.ok().as_strategy(generation_mode=mode)
            bounded(given(case=cases)(lambda case: hold(admin, case)))()


def operations(admin: httpx.Client) -> dict[str, Any]:
    paths = admin.get("/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}": asked for path in paths for method, asked in paths[path].items()}


def test_each_operation_has_a_name_of_its_own_and_its_problems(admin: httpx.Client) -> None:
    found = operations(admin)
    assert len({asked["operationId"] for asked in found.values()}) == len(found) > 40
    for name, asked in found.items():
        assert "422" not in asked["responses"], name
        for status in ("4XX", "5XX"):
            assert asked["responses"][status]["content"].keys() == {"application/problem+json"}, name


def test_all_but_signed_urls_ask_for_a_key_shown_in_one_of_two_ways(admin: httpx.Client) -> None:
    whole = admin.get("/openapi.json").json()
    assert {(s["type"], s.get("scheme", s.get("name"))) for s in whole["components"]["securitySchemes"].values()} == {
        ("http", "bearer"),
        ("apiKey", "X-API-Key"),
    }
    assert len(whole["security"]) == 2
    open_ones = {name for name, asked in operations(admin).items() if asked.get("security") == []}
    assert open_ones == {"GET /v1/signed/{token}", "PUT /v1/signed/{token}"}


def test_every_reference_leads_somewhere(admin: httpx.Client) -> None:
    whole = admin.get("/openapi.json").json()

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return own.union(*(references(value) for value in node.values()))
        return set().union(*(references(value) for value in node)) if isinstance(node, list) else set()

    for reference in references(whole):
        at: Any = whole
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]
        assert at


def test_the_page_for_people_names_every_route_and_every_code(admin: httpx.Client) -> None:
    page = (Path(__file__).parents[2] / "docs/http.md").read_text()
    for path in admin.get("/openapi.json").json()["paths"]:
        words = [word for word in path.split("/") if word and not word.startswith("{")]
        assert "signed" in path or all(f"/{word}" in page for word in words[-1:]), path
    codes = {error.code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, FumehoodError)}
    told = set(re.findall(r"`([a-z_]+)`", page.partition("## Problems")[2].partition("## Idempotency")[0]))
    assert codes - told == {"server_unreachable"}  # of the client: it never comes over the wire
