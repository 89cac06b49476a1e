"""Bad keys, bodies and clients: the right status, in OpenAI's shape, and nothing left behind."""

import json
import os
import socket
import time

import pytest

BODY = {"model": "tiny", "prompt": "abc " * 10, "max_tokens": 2}


def asked(served, **fields):
    with served.http() as http:
        return http.post("/v1/completions", json=BODY | fields)


def error_of(response):
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def open_files():
    return len(os.listdir("/proc/self/fd"))


def connect(served):
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def request_bytes(body, *, length=None):
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model": "tiny", "prompt": "\\ud800"}', b"\xff\xfe", b"[" * 100_000],
    ids=["empty", "cut", "list", "text", "lone surrogate", "no utf-8", "deep"],
)  # fmt: skip
def test_a_body_that_is_no_request_is_a_bad_request(served, body):
    with served.http() as http:
        response = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_every_kind_of_refusal_has_openais_shape(served):
    with served.http() as http:
        assert (http.get("/v1/nothing").status_code, http.get("/v1/completions").status_code) == (404, 405)
        assert "not found" in error_of(http.get("/v1/nothing"))["message"]
        plain = http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert plain.status_code == 415
    assert "application/json" in error_of(plain)["message"]


def test_chat_messages_are_checked(served):
    with served.http() as http:
        for messages in (
            [],
            [{"role": "tool", "content": "x"}],
            [{"role": "user"}],
            [{"role": "user", "content": [{}]}],
        ):
            response = http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
            assert (response.status_code, error_of(response)["param"]) == (400, "messages")


def test_only_the_key_opens_and_health_is_open(serve):
    served = serve(api_key="a secret")
    with served.http() as http:
        assert http.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
            for path in ("/v1/models", "/metrics"):
                refused = http.get(path, headers=headers)
                assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")
                assert "a secret" not in refused.text
        assert http.get("/v1/models", headers={"Authorization": "Bearer a secret"}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "host", "status"),
    [({}, "evil.example", 421), ({}, "evil.example:8000", 421), ({}, "localhost.evil.example", 421), ({}, "", 421),
     ({}, "LOCALHOST:1", 200), ({}, "[::1]:8000", 200), ({"api_key": "k"}, "evil.example", 200),
     ({"host": "0.0.0.0"}, "a.example", 200)],
)  # fmt: skip
def test_a_page_elsewhere_cannot_reach_a_server_without_a_key_by_a_name_of_its_own(serve, fields, host, status):
    served = serve(**fields)
    with served.http() as http:
        assert http.get("/v1/models", headers={"Host": host, "Authorization": "Bearer k"}).status_code == status


def test_a_body_beyond_the_limit_is_refused_declared_or_not(serve):
    served = serve(max_body="4KiB")

    def drip():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    with served.http() as http:
        for content in (b" " * 5000, drip()):
            response = http.post("/v1/completions", content=content, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
    assert asked(served).status_code == 200


def test_a_body_that_does_not_arrive_times_out(serve):
    served = serve(body_timeout=0.2)
    with connect(served) as slow:
        slow.sendall(request_bytes(BODY, length=5000))
        assert b" 408 " in slow.recv(1000).splitlines()[0]
    assert asked(served).status_code == 200


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", request_bytes(BODY)[:60]], ids=["nothing", "line", "head"])
def test_a_head_that_does_not_arrive_loses_its_connection(serve, begun):
    served = serve(body_timeout=0.2)
    before = open_files()
    with connect(served) as slow:
        slow.sendall(begun)
        assert slow.recv(1000) == b""
    with connect(served) as second:  # after a whole request too
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        while received := second.recv(1000):
            assert b"400" not in received
    served.until(lambda: open_files() <= before)


def test_who_reads_nothing_for_long_loses_the_connection(serve):
    served = serve(body_timeout=0.2)
    before = open_files()
    with connect(served) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        limit_s = time.monotonic() + 20
        with pytest.raises((BrokenPipeError, ConnectionResetError)):  # noqa: PT012 - one of many sends
            while time.monotonic() < limit_s:
                deaf.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
    served.until(lambda: open_files() <= before)
    assert asked(served).status_code == 200


def test_a_slow_answer_is_not_a_stalled_one(serve):
    served = serve(body_timeout=0.2)
    with served.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        started_s = time.monotonic()
        for line in stream.iter_lines():
            if line and time.monotonic() - started_s > 1:
                break
    assert time.monotonic() - started_s > 1


def test_past_the_queue_there_is_a_503_with_a_time_to_come_back(serve):
    served = serve(max_running=1, max_queue=1)
    with served.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as running:
        assert running.headers["X-Kvoffload-Queue-Position"] == "0"
        served.until(lambda: served.scheduler.n_running == 1)
        with served.http() as more, more.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as queued:
            assert queued.headers["X-Kvoffload-Queue-Position"] == "0"
            full = asked(served)
            assert (full.status_code, error_of(full)["code"]) == (503, "queue_full")
            assert int(full.headers["Retry-After"]) >= 1
    served.until_idle()
    assert asked(served).status_code == 200


LONG = BODY | {"max_tokens": 4000}  # far longer than any test waits


def outcomes(served):
    with served.http() as http:
        lines = http.get("/metrics").text.splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("kvoffload_requests_total{"))
    return {name.partition('"')[2].partition('"')[0]: float(value) for name, _, value in found}


def test_a_stream_that_its_client_closes_is_cancelled(serve):
    served = serve()
    with served.client() as client:
        stream = client.completions.create(**LONG, stream=True)
        for _ in range(3):
            next(stream)
        stream.close()
    served.until_idle()
    assert outcomes(served) == {"cancelled": 1}


def test_an_answer_that_nobody_waits_for_is_cancelled(serve):
    served = serve()
    with connect(served) as going:
        going.sendall(request_bytes(LONG))
        served.until(lambda: served.scheduler.n_running == 1)
    served.until_idle()
    assert outcomes(served) == {"cancelled": 1}


def test_a_client_that_goes_away_in_the_queue_leaves_it(serve):
    served = serve(max_running=1)
    with connect(served) as running:
        running.sendall(request_bytes(LONG))
        served.until(lambda: served.scheduler.n_running == 1)
        with connect(served) as queued:
            queued.sendall(request_bytes(LONG))
            served.until(lambda: served.scheduler.n_waiting == 1)
        served.until(lambda: served.scheduler.n_waiting == 0)
        assert served.scheduler.n_running == 1


def test_a_client_that_does_not_read_holds_up_nobody(serve):
    served = serve()
    with connect(served) as deaf:
        deaf.sendall(request_bytes(BODY | {"max_tokens": 300, "stream": True}))
        served.until(lambda: served.scheduler.n_running == 1)
        assert asked(served).status_code == 200
        served.until_idle()
    assert outcomes(served)["length"] == 2


def test_a_request_that_takes_too_long_ends_with_a_timeout(serve):
    served = serve(request_timeout=0.3)
    started_s = time.monotonic()
    response = asked(served, max_tokens=4000)
    assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
    assert time.monotonic() - started_s < 10
    with served.http() as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
        events = [line for line in stream.iter_lines() if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    served.until_idle()


def test_a_thousand_connects_and_disconnects_leave_nothing_behind(serve, tmp_path):
    served = serve(offload="nvme", nvme_dir=str(tmp_path), nvme_floor=0)
    assert asked(served).status_code == 200
    before = open_files()
    for i in range(1000):
        with connect(served) as going:
            if i % 3 == 1:
                going.sendall(request_bytes(LONG)[: 20 + i % 200])
            elif i % 50 == 2:
                going.sendall(request_bytes(LONG | {"stream": i % 4 == 0}))
                served.until(lambda: served.scheduler.n_running > 0)
    served.until_idle()
    served.until(lambda: open_files() <= before)
    served.until(lambda: not [*tmp_path.iterdir()])
    assert asked(served).status_code == 200


def test_metrics_count_what_happened(serve):
    served = serve()
    assert asked(served).status_code == 200
    with served.http() as http:
        text = http.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["kvoffload_prompt_tokens_total"]) == 40
    assert float(lines["kvoffload_generated_tokens_total"]) == 2
    assert float(lines['kvoffload_requests_total{outcome="length"}']) == 1
    assert float(lines['kvoffload_read_bytes_total{tier="cpu"}']) > 0
    assert float(lines["kvoffload_running_requests"]) == 0
    assert float(lines["kvoffload_time_to_first_token_seconds_count"]) == 1
