"""Sessions on disk: named in a request, read by whatever prompt begins like one, and safe from names and damage."""

import json
import stat

import pytest
from kvoffload_storage.manifests import read_manifest
from served import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime.engine import Runtime

TEXT = list("".join(f"{i} rivers run to the sea. " for i in range(9)).encode())  # a token a byte
RUNTIME = {k: v for k, v in SMALL.items() if k not in ("model", "keep_sessions", "max_new_tokens")}


@pytest.fixture(params=["cpu", "nvme"])
def storing(serve, tmp_path, request):
    """Starts servers on one folder of sessions."""

    def start(**fields):
        return serve(
            sessions=str(tmp_path / "stored"), offload=request.param, nvme_dir=str(tmp_path), nvme_floor=0,
            budget="100%", **fields,
        )  # fmt: skip

    return start


def ask(served, prompt, *, session=None, n=6, **fields):
    vendor = {} if session is None else {"session": session}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": n, "kvoffload": vendor} | fields
    with served.http() as http:
        return http.post("/v1/completions", json=body)


def answer(response):
    """Text, cached tokens and what is said of the session."""
    assert response.status_code == 200, response.text
    found = response.json()
    usage = found["usage"]["prompt_tokens_details"]
    return found["choices"][0]["text"], usage["cached_tokens"], found["kvoffload"].get("session")


def more(text):
    return list(text.encode())


def continued(loaded, prompt, n=6):
    """Text and tokens of a session of its own."""
    with Runtime(loaded, RuntimeConfig(**(RUNTIME | {"budget": "100%"}))).session() as session:
        session.prefill(prompt)
        return session.generate(SamplingConfig(max_new_tokens=n)), session.token_ids[len(prompt) :]


def alone(loaded, prompt):
    return continued(loaded, prompt)[0]


def test_a_prompt_that_goes_on_with_a_stored_session_reads_its_pages(storing, loaded, tmp_path):
    served = storing()
    text, cached, said = answer(ask(served, TEXT, session="rivers"))
    assert (cached, said) == (0, {"name": "rivers", "stored": True})
    whole = TEXT + continued(loaded, TEXT)[1] + more(" And the sea?")
    text, cached, said = answer(ask(served, whole, session="rivers"))
    assert cached == len(TEXT) + 5, "all of it but the newest token, which was not fed"
    assert text == alone(loaded, whole)
    with served.http() as http:
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["kvoffload_cached_tokens_total"]) == cached
    folder = tmp_path / "stored"
    assert {path.name for path in folder.iterdir()} == {"rivers.kvo"}
    assert stat.S_IMODE((folder / "rivers.kvo").stat().st_mode) == 0o700


def test_another_server_goes_on_and_any_prompt_that_begins_alike_shares(storing, loaded):
    answer(ask(storing(), TEXT, session="rivers"))
    second = storing()
    other = TEXT[:150] + more("or not.")
    text, cached, said = answer(ask(second, other))
    assert said is None
    assert 150 - RUNTIME["sinks"] - RUNTIME["recent"] - RUNTIME["page_size"] <= cached < 150
    assert text == alone(loaded, other)
    text, cached, _ = answer(ask(second, TEXT[:100]))
    assert 80 <= cached < 100, "a prompt that is only a beginning leaves a window to prefill"
    assert text == alone(loaded, TEXT[:100])
    assert answer(ask(second, "Nothing of the kind."))[1] == 0


def test_a_session_that_was_shared_stays_as_it_was(storing, tmp_path):
    served = storing()
    answer(ask(served, TEXT, session="rivers"))
    before = read_manifest(tmp_path / "stored" / "rivers.kvo")
    _, cached, said = answer(ask(served, TEXT[:150] + more("or not."), session="other"))
    assert cached > 0
    assert said["stored"]
    assert read_manifest(tmp_path / "stored" / "rivers.kvo") == before
    assert answer(ask(served, TEXT[:150] + more("or not. No")))[1] > 140, "the longest common beginning wins"


def test_a_name_is_stored_anew_by_a_prompt_that_turns_off(storing, loaded):
    served = storing()
    answer(ask(served, TEXT, session="x"))
    turned = TEXT[:120] + more("Then it turns.")
    text, cached, said = answer(ask(served, turned, session="x"))
    assert (cached > 90, said["stored"], text) == (True, True, alone(loaded, turned))
    whole = turned + continued(loaded, turned)[1] + more("!")
    assert answer(ask(served, whole, session="x"))[1] == len(turned) + 5


NAMES = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "a\0b", "a\n", "-rf", "a b", "é", "x" * 65,
         "%2e%2e", "~root", "a:b", 7, ["a"], {"a": 1}]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_that_could_be_a_path_is_refused(serve, tmp_path, name):
    served = serve(sessions=str(tmp_path / "stored"))
    response = ask(served, "abc", session=name)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "kvoffload")
    assert [*tmp_path.rglob("*")] == [tmp_path / "stored"]


def test_without_a_folder_a_name_is_refused(served):
    response = ask(served, "abc", session="x")
    assert response.status_code == 400
    assert "--sessions" in response.json()["error"]["message"]


def test_a_session_in_use_is_not_given_out_twice(serve, tmp_path):
    served = serve(sessions=str(tmp_path / "stored"))
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4000, "stream": True, "kvoffload": {"session": "x"}}
    with served.http() as http, http.stream("POST", "/v1/completions", json=body):
        served.until(lambda: served.scheduler.n_running == 1)
        assert ask(served, "abc", session="x").json()["error"]["code"] == "session_in_use"
        assert answer(ask(served, "abc", session="y"))[2]["stored"]
    served.until_idle()
    assert answer(ask(served, "abc", session="x"))[2]["stored"]


def test_a_session_of_other_settings_is_neither_read_nor_written_over(serve, tmp_path):
    folder = str(tmp_path / "stored")
    answer(ask(serve(sessions=folder), TEXT, session="x"))
    before = read_manifest(tmp_path / "stored" / "x.kvo")
    other = serve(sessions=folder, page_size=8)
    refused = ask(other, TEXT, session="x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "session_unusable")
    assert "stored" not in refused.json()["error"]["message"], "no path of the server's"
    assert answer(ask(other, TEXT))[1] == 0
    assert read_manifest(tmp_path / "stored" / "x.kvo") == before


def damage_page(path):
    file = next(path.glob("pages-*/layer-0002.kv"))
    data = bytearray(file.read_bytes())
    data[4096 * 5 + 70] ^= 1
    file.write_bytes(data)


def damage_manifest(path):
    data = json.loads((path / "manifest.json").read_text().splitlines()[0])
    (path / "manifest.json").write_text(json.dumps(data | {"version": 99}))


def damage_state(path):
    file = next(path.glob("state-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")


@pytest.mark.parametrize("damage", [damage_page, damage_manifest, damage_state])
def test_a_damaged_session_never_reaches_an_answer(storing, loaded, tmp_path, damage):
    served = storing()
    answer(ask(served, TEXT, session="x"))
    damage(tmp_path / "stored" / "x.kvo")
    assert answer(ask(served, TEXT + more("Then?")))[0] == alone(loaded, TEXT + more("Then?"))


def test_an_answer_is_given_where_it_cannot_be_stored(serve, tmp_path, monkeypatch):
    served = serve(sessions=str(tmp_path / "stored"))

    def fail(session, path, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("kvoffload.runtime.session.Session.save", fail)
    text, _, said = answer(ask(served, TEXT, session="x"))
    assert len(text) > 0
    assert (said["stored"], "OSError" in said["error"], str(tmp_path) in said["error"]) == (False, True, False)


def test_a_cancelled_request_stores_nothing(serve, tmp_path):
    served = serve(sessions=str(tmp_path / "stored"))
    with served.client() as client:
        stream = client.completions.create(
            model="tiny", prompt=TEXT, max_tokens=4000, stream=True, extra_body={"kvoffload": {"session": "x"}}
        )
        next(stream)
        stream.close()
    served.until_idle()
    assert not [*(tmp_path / "stored").glob("*.kvo")]
