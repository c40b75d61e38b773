"""The OpenAPI document: what FastAPI makes of the routes, with our problems, our keys and short operation ids."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from fumehood.gateway import answers, problems

_PROBLEM = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "refused; `code` says why", "content": _PROBLEM},
    "5XX": {"description": "not now, not here, or failed inside", "content": _PROBLEM},
}
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer fh_..."},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
NO_KEY: dict[str, Any] = {"security": []}  # openapi_extra of a route that asks for none


def operation_id(route: APIRoute) -> str:
    return f"{route.tags[0]}_{route.name.strip('_')}" if route.tags else route.name


class Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            document["security"] = [{name: []} for name in _SCHEMES]
            parts = document["components"]
            parts["securitySchemes"] = _SCHEMES
            parts["schemas"]["Problem"] = answers.Problem.model_json_schema()
            self.openapi_schema = document
        return self.openapi_schema
