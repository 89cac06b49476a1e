"""What every rank of a model does in test_ranks.py, under torchrun: ``ranked.py FOLDER`` writes FOLDER/rank-N.json."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import SMALL

from kvoffload.config import RuntimeConfig, SamplingConfig
from kvoffload.errors import KvoffloadError
from kvoffload.models.catalog import load_model, resolve
from kvoffload.models.parallel import find_ranks
from kvoffload.runtime import session as session_module
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.ranks import all_stats

PROMPT = list(range(200))
N_NEW = 16
CASES = {
    "sparse": {"pool": "none"},
    "bytes": {"pool": "none", "budget": "16KiB"},
    "full": {"budget": "100%"},
    "files": {"pool": "none", "offload": "nvme", "page_size": 32, "recent": 32, "budget": "50%"},
    "pooled": {},
}


def run(session, sampling):
    session.prefill(PROMPT)
    tokens = [event.token for event in session.stream(sampling)]
    layer = session.cache.offloaded[0]
    return {"tokens": tokens, "stats": all_stats(session).as_dict(), "folder": str(session.config.nvme_dir),
            "n_layers": session.cache.n_offloaded, "rows": layer.geometry.rows}  # fmt: skip


def told(call):
    """The name of the error that a call raises, and its text."""
    try:
        call()
    except KvoffloadError as error:
        return [type(error).__name__, str(error)]
    return None


def interrupted(session):
    """Only one rank cancels, or has a timeout, and all of them end."""
    session.prefill(PROMPT)
    if session.ranks.rank == 1:
        session.cancel()
    found = [told(lambda: session.generate(SamplingConfig(max_new_tokens=4)))]
    timeout = 1e-9 if session.ranks.rank == 0 else None
    found.append(told(lambda: session.generate(SamplingConfig(max_new_tokens=4), timeout_s=timeout)))
    return [name for name, _ in found], session.generate(SamplingConfig(max_new_tokens=4))


@contextmanager
def uneven_room(rank):
    """As if one rank's device had less memory left for a prefill than the other's."""
    before = session_module.chunk_tokens
    session_module.chunk_tokens = lambda *_, **__: 64 if rank else 200
    try:
        yield
    finally:
        session_module.chunk_tokens = before


def check(pp_size, folder):
    loaded = load_model(resolve("tiny"), dtype="float32", device="cpu", ranks=find_ranks(pp_size))

    def runtime(**fields):
        return Runtime(loaded, RuntimeConfig(**(SMALL | {"nvme_dir": folder} | fields)))

    greedy, found = SamplingConfig(max_new_tokens=N_NEW), {}
    for name, fields in CASES.items():
        with runtime(**fields).session() as session:
            found[name] = run(session, greedy)
    with runtime(**CASES["sparse"]).session() as session, uneven_room(session.ranks.rank):
        found["chunks"] = run(session, greedy)
    tested = runtime(self_test=True)
    with tested.session() as session:
        found["unseeded"] = run(session, SamplingConfig(max_new_tokens=N_NEW, temperature=1.0))
        found["save"] = told(lambda: session.save(folder / "one.kvo"))
    with tested.session() as session:
        found["interrupted"] = interrupted(session)
    found["restore"] = told(lambda: tested.restore(folder / "one.kvo"))
    found["open"] = told(lambda: tested.open_session(folder / "one.kvo"))
    found["anew"] = told(lambda: runtime(policy="retro:window=4"))
    found["policy"] = told(lambda: runtime(policy="prhs"))
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    ranks = find_ranks()
    found = {"tensor": check(1, folder), "pipeline": check(ranks.count, folder)}
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
