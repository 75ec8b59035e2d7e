"""A client of the API with a token, and what every error of the API looks like."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client

API = "/api/v1/conversations/"


class Api:
    """An API client with a token."""

    def __init__(self, token: str = "", **headers: str) -> None:
        self.client = Client(raise_request_exception=False)
        self.headers = {"Authorization": f"Bearer {token}", **headers} if token else headers

    def __call__(self, method: str, path: str, body: Any = None, raw: bytes | None = None) -> Any:
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        return self.client.generic(
            method, path, data, content_type="application/json", headers=self.headers
        )


@pytest.fixture
def api(ana: User, token_of: Any) -> Api:
    return Api(token_of(ana))


def assert_problem(reply: Any, status: int, code: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.content
    assert reply["Content-Type"] == "application/problem+json"
    body = reply.json()
    assert set(body) == {
        *("type", "title", "status", "detail", "instance", "request_id", "errors", "error")
    }
    assert body["status"] == status and body["detail"]
    assert body["request_id"] == reply["X-Request-ID"]
    assert set(body["error"]) == {"message", "type", "code", "param"}
    assert body["error"]["code"] == code
    assert all(set(error) == {"detail", "attr", "code"} for error in body["errors"])
    return body
