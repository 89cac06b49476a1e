"""Two ranks of one model on gloo, started by torchrun: tokens and counts are those of one process."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranked import CASES, N_NEW, PROMPT, run
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import UnsupportedModelError, UsageError
from kvoffload.models.catalog import load_config, resolve
from kvoffload.models.parallel import Ranks, find_ranks
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.limits import Limits
from kvoffload.runtime.plan import make_plan
from kvoffload.runtime.ranks import merge_stats, rank_config, replays

KINDS = ("tensor", "pipeline")


def torchrun(*arguments, **options):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(program, capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of two ranks found, by the kind of parallelism."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(str(Path(__file__).with_name("ranked.py")), str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((folder / f"rank-{i}.json").read_text()) for i in range(2)]
    return {kind: [rank[kind] for rank in ranks] for kind in KINDS}


@pytest.fixture(scope="module")
def alone(loaded):
    """The same in one process."""
    found = {}
    for name, fields in CASES.items():
        with Runtime(loaded, RuntimeConfig(**(SMALL | fields))).session() as session:
            found[name] = run(session, SamplingConfig(max_new_tokens=N_NEW))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["sparse", "bytes", "full", "files"])
def test_greedy_tokens_are_those_of_one_process(told, alone, kind, case):
    assert [rank[case]["tokens"] for rank in told[kind]] == [alone[case]["tokens"]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_less_room_make_all_prefill_in_smaller_chunks(told, alone, kind):
    assert [rank["chunks"]["tokens"] for rank in told[kind]] == [alone["sparse"]["tokens"]] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_budget_is_dense(told, stock, kind):
    with torch.no_grad():
        dense = stock.model.generate(torch.tensor([PROMPT]), max_new_tokens=N_NEW, do_sample=False, pad_token_id=256)
    assert told[kind][0]["full"]["tokens"] == dense[0, len(PROMPT) :].tolist()


def test_each_rank_keeps_its_own_heads_or_layers(told, alone):
    assert (alone["sparse"]["n_layers"], alone["sparse"]["rows"]) == (4, 2)
    assert [(rank["sparse"]["n_layers"], rank["sparse"]["rows"]) for rank in told["tensor"]] == [(4, 1), (4, 1)]
    assert [(rank["sparse"]["n_layers"], rank["sparse"]["rows"]) for rank in told["pipeline"]] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["sparse", "bytes", "full", "files"])
def test_statistics_are_those_of_all_ranks(told, alone, kind, case):
    expected = alone[case]["stats"]
    assert sum(expected["decode_bytes_read"].values()) > 0
    for rank in told[kind]:
        given = rank[case]["stats"]
        for name in ("decode_bytes_read", "bytes_written"):
            assert given[name] == expected[name]
        for name in ("read_tokens_per_step", "charged_share", "budget_tokens", "completion_mass"):
            assert given[name] == pytest.approx(expected[name], rel=1e-4)


def test_layers_that_are_pooled_read_the_same_number_of_pages(told, alone):
    for kind in KINDS:
        assert told[kind][0]["pooled"]["stats"]["read_share"] == pytest.approx(alone["pooled"]["stats"]["read_share"])
    assert told["pipeline"][0]["pooled"]["tokens"] == alone["pooled"]["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_agree_on_what_is_drawn_without_a_seed(told, kind):
    first, second = (rank["unseeded"]["tokens"] for rank in told[kind])
    assert first == second


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_one_rank_ends_all_before_the_same_step(told, kind):
    first, second = (rank["interrupted"] for rank in told[kind])
    assert first == second
    assert first[0] == ["CancelledError", "TimedOutError"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_ranks_are_in_folders_of_their_own(told, kind):
    assert [Path(rank["files"]["folder"]).name for rank in told[kind]] == ["rank-0", "rank-1"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["save", "restore", "open"])
def test_session_files_are_refused(told, kind, what):
    for rank in told[kind]:
        name, message = rank[what]
        assert (name, "one process" in message) == ("UsageError", True)


def test_policies_that_need_more_than_a_rank_has_are_refused(told):
    for kind in KINDS:
        assert all("cannot compute tokens anew" in rank["anew"][1] for rank in told[kind])
    assert all("pipeline stages" in rank["policy"][1] for rank in told["pipeline"])
    assert all(rank["policy"] is None for rank in told["tensor"])


def test_only_the_first_rank_of_the_command_is_heard():
    flags = ["--max-new-tokens", "5", "--json", "--quiet", "--offload", "cpu"]
    done = torchrun("-m", "kvoffload", "generate", "-m", "tiny", "-p", "a b c d e f" * 20, *flags)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["new_tokens"] == 5


def test_a_command_of_one_process_is_refused_under_torchrun(monkeypatch):
    from kvoffload import cli

    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cli.run(["plan", "--model", "tiny"]) == 2


def test_stages_without_torchrun_are_refused():
    with pytest.raises(UsageError, match="pp_size: 2 is neither 1 nor the 1 processes"):
        find_ranks(2)


def test_heads_that_cannot_be_shared_out_are_refused_with_what_can():
    config = load_config(resolve("smollm2-135m"))
    Ranks(tp_size=3).check_model(config)
    with pytest.raises(UnsupportedModelError, match="3 kv heads of llama cannot be shared out to 2 ranks; --pp-size 2"):
        Ranks(tp_size=2).check_model(config)
    with pytest.raises(UnsupportedModelError, match="30 layers cannot"):
        Ranks(pp_size=31).check_model(config)


def test_a_rank_has_its_part_of_what_is_set_in_bytes():
    config = RuntimeConfig(budget="16MiB", nvme_max="8G", cpu_max="2G", nvme_dir="/x")
    part = rank_config(config, Ranks(rank=1, tp_size=4))
    assert part.budget.amount == 4 << 20
    assert (part.nvme_max, part.cpu_max, part.nvme_dir) == (2 << 30, 1 << 29, Path("/x/rank-1"))
    for budget in ("5%", "2048"):
        assert rank_config(RuntimeConfig(budget=budget), Ranks(tp_size=4)).budget.amount == float(budget.strip("%"))


def test_statistics_are_merged_by_what_they_are(open_session, ids):
    """Bytes add up, shares are means over layers and heads, times are the slowest rank's."""
    session = open_session()
    session.prefill(ids(100))
    session.generate(SamplingConfig(max_new_tokens=4))
    one = session.stats()
    other = replace(one, read_share=3 * one.read_share, tpot_ms=2 * one.tpot_ms, graph_steps=one.graph_steps)
    both = merge_stats([one, other], [3, 1])
    assert both.read_share == pytest.approx(1.5 * one.read_share)
    assert both.tpot_ms == 2 * one.tpot_ms
    assert both.decode_bytes_read == {tier: 2 * n for tier, n in one.decode_bytes_read.items()}
    assert (both.resident_bytes, both.new_tokens, both.graph_steps) == (2 * one.resident_bytes, 4, one.graph_steps)
    assert merge_stats([one], [1]) == one


def test_a_plan_is_for_one_rank_beside_the_others_on_its_host():
    config = load_config(resolve("llama-3.1-8b-shape"))
    sizes = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "weight_bytes": 16 << 30}
    limits = Limits(host=100, device=50, disk=60)
    one = make_plan(config, RuntimeConfig(), 1 << 17, limits=limits, **sizes)
    tp = make_plan(config, RuntimeConfig(), 1 << 17, limits=limits, ranks=Ranks(tp_size=2, on_host=2), **sizes)
    pp = make_plan(config, RuntimeConfig(), 1 << 17, limits=limits, ranks=Ranks(pp_size=3, on_host=2), **sizes)
    assert (tp.kv_bytes, tp.needs[0].n_bytes) == (one.kv_bytes // 2, 8 << 30)
    assert pp.footprint.n_layers == 12
    assert (tp.limits.host, tp.limits.device, tp.limits.disk) == (50, 50, 30)


def test_steps_of_several_ranks_are_replayed_only_where_that_was_asked_for():
    heads, stages = Ranks(tp_size=2), Ranks(pp_size=2)
    for how, expected in (("auto", [True, False, False]), ("on", [True, True, False]), ("off", [False, False, False])):
        config = RuntimeConfig(cuda_graph=how)
        assert [replays(config, ranks) for ranks in (Ranks(), heads, stages)] == expected
    assert not replays(RuntimeConfig(cuda_graph="on", gate=True, completion="anchored"), heads)
