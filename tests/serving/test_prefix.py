"""The application under a prefix, as an engine that serves several mounts it."""

from __future__ import annotations

import json

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from dmoe_export.serving.app import application
from dmoe_export.serving.gate import path_of
from dmoe_export.serving.house import House
from dmoe_export.serving.metrics import Metrics


@pytest.mark.parametrize(("path", "prefix", "inside"), [
    ("/health/live", "", "/health/live"),
    ("/a/health/live", "/a", "/health/live"), ("/a/", "/a", "/"), ("/a", "/a", "/"),
    ("/a/b/v1", "/a/b/", "/v1"), ("/ab/v1", "/a", "/ab/v1"), ("/", "", "/"), ("/health/live", "/a", "/health/live")])
def test_the_path_inside(path, prefix, inside):
    assert path_of({"path": path, "root_path": prefix}) == inside


def test_open_paths_and_keys_are_the_same_under_a_prefix(capsys):
    app = Starlette(routes=[Mount("/a", application(House({}, Metrics(), 1, 1.0), ["key"]))])
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/a/health/live").json() == {"status": "live"}
    assert client.get("/a/").status_code == 200 and client.get("/a/page/page.js").status_code == 200
    assert client.get("/a/v1/models").status_code == 401
    found = client.get("/a/v1/models", headers={"authorization": "Bearer key"})
    assert found.status_code == 200 and found.json()["data"] == []
    said = [json.loads(line)["path"] for line in capsys.readouterr().err.splitlines()]
    assert said == ["/", "/v1/models", "/v1/models"]  # health and files are asked by machines
