"""The recipe of examples/ray_serve.py on a local cluster: replicas that answer what one session gives."""

import json
import socket

import httpx
import pytest

from kvoffload.config import SamplingConfig
from kvoffload.runtime.engine import Runtime

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray
PROMPT = "a b c d e f g " * 20


@pytest.fixture(scope="module")
def url(cluster):
    """Two replicas of ``tiny``."""
    serve = pytest.importorskip("ray.serve", reason="the extra [ray] is not installed")
    from examples.ray_serve import build_app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app({"model": "tiny", "budget": "10%", "replicas": "2", "cpus": "0.5", "self_test": "false"}))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def ask(url, **fields):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def test_replicas_answer_what_a_session_gives(url):
    runtime = Runtime.from_pretrained("tiny", budget="10%", self_test=False, prefill_chunk=256)
    with runtime.session() as session:
        session.prefill(PROMPT)
        expected = session.generate(SamplingConfig(max_new_tokens=6))
    answers = [ask(url) for _ in range(6)]
    assert [a.json()["choices"][0]["text"] for a in answers] == [expected] * 6


def test_answers_stream_through(url):
    """Letter by letter as far as letters are whole."""
    with httpx.stream("POST", f"{url}/v1/completions", timeout=60, json={
        "model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True,
    }) as streamed:  # fmt: skip
        lines = [line.removeprefix("data: ") for line in streamed.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == ask(url, max_tokens=12).json()["choices"][0]["text"]


def test_refusals_keep_their_status(url):
    assert ask(url, model="other").status_code == 404
    assert ask(url, n=2).status_code == 400


def test_all_replicas_are_at_work(url):
    from ray import serve

    (deployment,) = serve.status().applications["default"].deployments.values()
    assert deployment.replica_states == {"RUNNING": 2}
