"""The steps that ``kvoffload bench`` times are replays where steps can be, of one sequence and of several."""

import pytest
import torch
from families import family_model
from recorded import record
from torch.testing import assert_close

from kvoffload.bench.prompt_kv import PromptKv
from kvoffload.bench.runs import Case, OurRun
from kvoffload.config import RuntimeConfig


@pytest.mark.parametrize("n_sequences", [1, 3])
def test_what_is_timed_is_replayed_and_gives_what_ordinary_steps_give(n_sequences):
    model = family_model("llama")
    config = RuntimeConfig(budget="20%", sinks=4, recent=8, page_size=4)
    kv, case = PromptKv(model, n_sequences, 700), Case(640, n_sequences, room=60)
    runs = [OurRun(model, config, kv, case) for _ in range(2)]
    runs[0]._session.replays.capture = record
    ids = torch.randint(2, 90, (12, n_sequences, 1), generator=torch.Generator().manual_seed(2))
    with runs[0].cache, runs[1].cache:
        for token in ids:
            assert_close(runs[0].step(token), runs[1].step(token), rtol=1e-4, atol=1e-4)
        assert [run.told()["graph_steps"] for run in runs] == [11, 0]
        assert runs[0].told()["graph_refusal"] == ""
        assert runs[0].told()["read_tokens_per_step"] == runs[1].told()["read_tokens_per_step"] > 0
