"""``kvoffload serve``: what it refuses before any weights load, and a real process from start to signal."""

import os
import re
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "openai")):
    pytest.skip("pip install 'kvoffload[test]' brings the server's packages", allow_module_level=True)

import openai
import typer

from kvoffload import cli
from kvoffload.server import command
from kvoffload.settings import Settings


@pytest.fixture
def refused(capsys, monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command, "load_model", load)

    def run(*arguments):
        code = cli.run(["serve", "--model", "tiny", *arguments])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "port: 70000"),
        (["--max-queue", "-1"], "max_queue: -1"),
        (["--max-running", "0"], "max_running: 0"),
        (["--max-body", "much"], "max_body: "),
        (["--api-key", ""], "api_key: "),
        (["--request-timeout", "0"], "request_timeout: 0"),
        (["--budget", "200%"], "200%"),
        (["--host", "256.0.0.1.no-such-host.invalid"], "cannot be used"),
        (["--model", "none-such"], "none-such"),
    ],
)
def test_bad_input_is_refused_before_weights_load(refused, arguments, said):
    assert said in refused(*arguments)


def test_a_taken_port_is_refused_before_weights_load(refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("--port", str(port))


def test_missing_packages_are_named(refused, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "uvicorn" else object())
    assert "serve needs uvicorn: pip install 'kvoffload[serve]'" in refused()


def test_every_flag_is_a_setting_and_every_setting_of_a_server_has_one():
    names = {option.name for option in typer.main.get_command(cli.app).commands["serve"].params}
    assert names - set(command.ServeSettings.model_fields) == {"config"}
    assert set(command.ServeSettings.model_fields) - set(Settings.model_fields) <= names


def test_a_key_is_not_shown(monkeypatch, refused):
    monkeypatch.setenv("KVOFFLOAD_API_KEY", "a secret")
    assert "a secret" not in refused("--port", "-1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_served_process_answers_and_ends_cleanly(tmp_path, number):
    program = [sys.executable, "-m", "kvoffload", "serve", "--model", "tiny", "--port", "0", "--offload", "nvme",
               "--nvme-dir", str(tmp_path), "--nvme-floor", "0", "--grace", "0"]  # fmt: skip
    environment = os.environ | {"COLUMNS": "200", "KVOFFLOAD_API_KEY": "k"}
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+/v1", line)))
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            answer = client.completions.create(model="tiny", prompt="abc " * 40, max_tokens=3)
            assert answer.usage.completion_tokens == 3
            assert [*tmp_path.iterdir()], "the finished conversation is kept"
            stream = client.completions.create(model="tiny", prompt="abc " * 40, max_tokens=4000, stream=True)
            next(stream)
            process.send_signal(number)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert process.wait(timeout=30) in (0, 128 + number)
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert not [*tmp_path.iterdir()]
