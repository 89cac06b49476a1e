"""The real ``openai`` client over loopback: answers, streams, usage, and what many at once get."""

import threading

import openai
import pytest
from served import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.runtime.engine import Runtime

CHAT = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Tell me of rivers. " * 9}]
RUNTIME = {k: v for k, v in SMALL.items() if k not in ("model", "keep_sessions", "max_new_tokens")}


@pytest.fixture
def client(served):
    with served.client() as client:
        yield client


def alone(loaded, prompt, n, **fields):
    """What a session of the same configuration generates."""
    with Runtime(loaded, RuntimeConfig(**(RUNTIME | fields))).session() as session:
        session.prefill(prompt)
        return session.generate(SamplingConfig(max_new_tokens=n))


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "kvoffload"


def test_a_chat_answer_is_what_a_session_gives(client, loaded):
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12, temperature=0)
    prompt = "\n\n".join(message["content"] for message in CHAT)
    assert answer.choices[0].message.content == alone(loaded, prompt, 12)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat_is_the_same_in_pieces(client):
    whole = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=12)
    chunks = [*client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )]  # fmt: skip
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "length"]
    assert chunks[-1].usage.completion_tokens == 12


def test_a_completion_takes_text_and_token_ids(client):
    text = "once upon a time " * 6
    ids = client.completions.create(model="tiny", prompt="x", max_tokens=1)  # anything: the server is up
    assert ids.object == "text_completion"
    first = client.completions.create(model="tiny", prompt=text, max_tokens=8)
    again = client.completions.create(model="tiny", prompt=[text], max_tokens=8)
    streamed = client.completions.create(model="tiny", prompt=text, max_tokens=8, stream=True)
    assert first.choices[0].text == again.choices[0].text == "".join(c.choices[0].text for c in streamed)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client):
    whole = client.completions.create(model="tiny", prompt="abc " * 20, max_tokens=16).choices[0].text
    at = next(i for i in range(4, len(whole)) if whole[i].isascii() and whole.index(whole[i]) == i)
    stopped = client.completions.create(model="tiny", prompt="abc " * 20, max_tokens=16, stop=[whole[at]])
    assert stopped.choices[0].text == whole[:at]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_seed_fixes_what_is_drawn(client):
    def draw(seed):
        options = {"temperature": 1.0, "top_p": 0.95, "seed": seed, "max_tokens": 16}
        return client.completions.create(model="tiny", prompt="abc " * 5, **options).choices[0].text

    assert draw(5) == draw(5)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_the_vendor_object_takes_a_budget_and_tells_what_it_cost(client):
    def cost(budget):
        answer = client.completions.create(
            model="tiny", prompt="some words " * 40, max_tokens=8, extra_body={"kvoffload": {"budget": budget}}
        )
        return answer.model_extra["kvoffload"]

    small, large = cost("5%"), cost("100%")
    assert 0 < small["read_share"] < large["read_share"]
    assert small["charged_share"] > small["read_share"]
    assert 0 < small["completion_mass"] < 1
    assert small["bytes_read"]["cpu"] + small["bytes_read"]["nvme"] > 0
    assert set(small) >= {"hit_rate", "decode_bytes_read", "bytes_written"}


def test_progress_comes_in_chunks_of_its_own(client):
    chunks = [*client.completions.create(
        model="tiny", prompt="p" * 200, max_tokens=2, stream=True, extra_body={"kvoffload": {"return_progress": True}}
    )]  # fmt: skip
    told = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk.model_extra]
    assert [progress["processed"] for progress in told] == [50, 100, 150, 200]
    assert {(progress["total"], progress["cache"]) for progress in told} == {(200, 0)}


def test_a_stream_tells_what_every_layer_did_with_each_token(client):
    chunks = [*client.completions.create(
        model="tiny", prompt="p" * 200, max_tokens=6, stream=True,
        extra_body={"kvoffload": {"return_layers": True, "budget": "20%"}},
    )]  # fmt: skip
    told = [chunk.model_extra["kvoffload"] for chunk in chunks if "kvoffload" in chunk.model_extra]
    layers, last = [each["layers"] for each in told if "layers" in each], told[-1]
    assert len(layers) == 5, "the first token comes from the prefill"
    assert {len(values) for each in layers for values in each.values()} == {4}
    read = [sum(each["read"]) / 4 for each in layers]
    assert sum(read) / 5 == pytest.approx(last["read_tokens_per_step"], rel=1e-3)
    completed = [sum(each["completed"]) / 4 for each in layers]
    assert sum(completed) / 5 == pytest.approx(last["completion_mass"], rel=1e-2)


def test_sixteen_at_once_get_what_each_gets_alone(served, loaded):
    prompts = [f"{i} of many " * (3 + 11 * (i % 6)) for i in range(16)]
    lengths = [4 + i % 9 for i in range(16)]
    texts: list[str | None] = [None] * 16

    def ask(i):
        with served.client() as client:
            answer = client.completions.create(model="tiny", prompt=prompts[i], max_tokens=lengths[i], temperature=0)
            texts[i] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=[i]) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [alone(loaded, prompt, n) for prompt, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"model": "other"}, 404, "'other' is not served"),
        ({"temperature": 3}, 400, "temperature: 3"),
        ({"temperature": 0.001}, 400, "neither 0 nor at least"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 2}, 400, "n: 2"),
        ({"max_tokens": 0}, 400, "max_tokens: 0"),
        ({"max_tokens": 9000}, 400, "context is 8,192"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"logprobs": 2}, 400, "logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "only for stream=true"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": [3, 300]}, 400, "token 300"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"extra_body": {"temprature": 1}}, 400, "temprature: unknown name"),
        ({"extra_body": {"kvoffload": {"budget": "much"}}}, 400, "'much' is not a budget"),
        ({"extra_body": {"kvoffload": {"sesion": "x"}}}, 400, "sesion"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_name(client, fields, status, said):
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(**({"model": "tiny", "prompt": "abc", "max_tokens": 2} | fields))
    assert refused.value.status_code == status
    assert said in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"
