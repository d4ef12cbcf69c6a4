"""A key opens every route of the schema, and none but those of the gate's list is open without one."""

from __future__ import annotations

import httpx

from autotune.serve.gate import OPEN
from tests.serve.servers import running

KEY = {"Authorization": "Bearer key"}


def test_every_route_and_method_of_the_schema_asks_for_the_key() -> None:
    with running(keys=["key"]) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        paths = client.get("/openapi.json", headers=KEY).json()["paths"]
        asked = [(method, path.replace("{name}", "tiny")) for path, methods in paths.items() for method in methods]
        found = {(method, path): client.request(method, path, json={}).status_code for method, path in asked}
    assert {"/v1/completions", "/metrics", "/tokenize", "/autotune/rollback"} <= set(paths)
    assert {each: status for each, status in found.items() if each[1] not in OPEN and status != 401} == {}
    assert found["get", "/livez"] == 200
