"""Access to the server: hosts, origins, the key, and what browsers are told."""

from __future__ import annotations

import socket
import urllib.error

import pytest
from serving import Client, Letters, endless_model, served

from megatron.serving.access import Access, check_key, normalize_origin, parse_host
from megatron.serving.fields import RequestError

PAGE = "https://app.example.org"


@pytest.fixture(scope="module")
def client():
    access = Access.for_server("127.0.0.1", ["my.proxy"], [PAGE], "sekret")
    with served(endless_model(), Letters(), access=access, name="org/a model") as client:
        yield client


def send_request(client: Client, method: str, path: str, body: object = None, **headers: str):
    """Status, headers and message of a request with the key."""
    headers = {"authorization": "Bearer sekret"} | headers
    try:
        with client.open(method, path, body, **headers) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def test_a_foreign_host_is_refused(client: Client) -> None:
    own = ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8", "10.1.2.3:5000", "my.proxy.", socket.gethostname())
    for host in own:
        assert send_request(client, "GET", "/v1/models", host=host)[0] == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:5000", "my.proxy@evil", "x y", "[evil]"):
        for path in ("/health", "/v1/models", "/api"):
            status, _, said = send_request(client, "GET", path, host=host)
            assert status == 403 and "--allow-host" in said, host
    everyone = Access.for_server("0.0.0.0", ["*"])
    assert everyone.check_host(["evil.example"]) == "evil.example" and everyone.check_host([]) == ""


def test_a_foreign_origin_is_refused(client: Client) -> None:
    for origin in (
        f"http://127.0.0.1:{client.port}",
        "http://localhost:3000",
        "http://[::1]",
        PAGE,
        "HTTPS://APP.example.org:443",
    ):
        status, headers, _ = send_request(client, "GET", "/v1/models", origin=origin)
        assert (status, headers["access-control-allow-origin"], headers["vary"]) == (200, origin, "Origin"), origin
    assert send_request(client, "GET", "/v1/models", origin="http://my.proxy", host="my.proxy")[0] == 200
    for origin in ("https://evil.example", "http://localhost.evil.example", "http://localhost@evil.example", "http://6.6.6.6"):
        status, headers, said = send_request(client, "GET", "/v1/models", origin=origin)
        assert status == 403 and "--allow-origin" in said and "access-control-allow-origin" not in headers, origin
    for origin in ("http://app.example.org", PAGE + ":8443", PAGE + "/", "app.example.org"):  # not quite the allowed one
        assert send_request(client, "GET", "/v1/models", origin=origin)[0] == 403, origin
    assert (
        Access.for_server("127.0.0.1", (), ["*"]).check_origin(["https://evil.example"], "localhost") == "https://evil.example"
    )
    with pytest.raises(RequestError, match="evil"):
        Access.for_server("127.0.0.1", (), [PAGE]).check_origin([PAGE, "https://evil.example"], "localhost")


def test_a_browser_is_told_what_it_may_send(client: Client) -> None:
    wish = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, x-stainless-os"}
    status, headers, _ = send_request(client, "OPTIONS", "/v1/completions", origin=PAGE, authorization="", **wish)
    assert (status, headers["access-control-allow-origin"]) == (204, PAGE)
    assert "POST" in headers["access-control-allow-methods"]
    assert headers["access-control-allow-headers"] == "authorization, x-stainless-os"
    assert send_request(client, "OPTIONS", "/v1/completions", origin="https://evil.example", **wish)[0] == 403
    assert send_request(client, "OPTIONS", "/v1/completions", **wish)[0] == 405
    for body, expected in (({"prompt": "x", "max_tokens": 1, "stream": True}, 200), ({"prompt": 3}, 400)):
        status, headers, _ = send_request(client, "POST", "/v1/completions", body, origin=PAGE)
        assert (status, headers["access-control-allow-origin"]) == (expected, PAGE)


def test_a_body_needs_its_content_type(client: Client) -> None:
    """Without it a page of any origin could send one that a browser asks nobody about."""
    body = {"prompts": ["x"], "tokens_to_generate": 1}
    for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
        assert send_request(client, "PUT", "/api", body, content_type=kind)[0] == 200, kind
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/json;charset=utf-16", ""):
        status, _, said = send_request(client, "PUT", "/api", body, content_type=kind)
        assert status == 415 and "JSON" in said, kind
    assert send_request(client, "POST", "/v1/completions", {"prompt": "x"}, content_type="text/plain")[0] == 415
    assert send_request(client, "PUT", "/api", body, content_encoding="gzip")[0] == 415


def test_a_key_is_asked_for(client: Client) -> None:
    for given in ("Bearer sekret", "bearer  sekret"):
        assert send_request(client, "GET", "/v1/models", authorization=given)[0] == 200
    for given in ("", "Bearer", "Bearer sekre", "Bearer sekret2", "Basic sekret", "sekret", "Bearer s\xe9kret"):
        for method, path in (("GET", "/v1/models"), ("PUT", "/api"), ("GET", "/nothing")):
            status, headers, said = send_request(client, method, path, authorization=given)
            assert (status, headers["www-authenticate"]) == (401, "Bearer") and "invalid_api_key" in said
    assert send_request(client, "GET", "/health", authorization="")[0] == 200
    assert check_key(None, {}) is None and check_key("a", {"MEGATRON_API_KEY": "b"}) == "a"
    assert check_key(None, {"MEGATRON_API_KEY": "b"}) == "b"
    for flag, variable in ((" ", "x"), ("", "x"), (None, ""), (None, "s\xe9")):
        with pytest.raises(ValueError, match="MEGATRON_API_KEY" if flag is None else "--api-key"):
            check_key(flag, {"MEGATRON_API_KEY": variable})


def test_the_served_model_is_found_by_its_name(client: Client) -> None:
    for path in ("/v1/models/org/a%20model", "/v1/models/org%2Fa%20model"):
        assert '"id":"org/a model"' in send_request(client, "GET", path)[2]
    for path in ("/v1/models/org", "/v1/models/other", "/v1/models/org/a%20model/"):
        status, _, said = send_request(client, "GET", path)
        assert status == 404 and "model_not_found" in said


def test_names_of_hosts_and_origins() -> None:
    assert [parse_host(text) for text in ("A.b:1", "[::1]", "a.", "", "a/b", "a:b", ".")] == ["a.b", "::1", "a", *[None] * 4]
    assert normalize_origin("HTTP://A:80") == "http://a" and normalize_origin("https://a:80") == "https://a:80"
    assert [normalize_origin(text) for text in ("", "a", "http://", "http://a/b", "*")] == [None] * 5
    for flags, name in ((dict(hosts=["a/b"]), "--allow-host a/b"), (dict(origins=["app.example.org"]), "--allow-origin app")):
        with pytest.raises(ValueError, match=name):
            Access.for_server("127.0.0.1", **flags)
