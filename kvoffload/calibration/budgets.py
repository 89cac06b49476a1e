"""What each layer's budget is worth: the divergence of the model's output from dense attention when one layer alone
reads little."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvoffload.attention.build import SliceBudget
from kvoffload.attention.layer import LayerCache
from kvoffload.calibration.recipes import LayerResult
from kvoffload.calibration.run import OnProgress, Progress, State
from kvoffload.completion.calibrated import Calibration
from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.teacher import prefill, teacher_forced
from kvoffload.layer_budgets import LADDER, curve_name
from kvoffload.models.cache import OffloadCache
from kvoffload.models.watch import offloaded_layers
from kvoffload.units import Budget

_FULL = Budget.parse("100%")


@torch.inference_mode()
def measure_layers(
    model: Any, sequences: Sequence[Tensor], config: RuntimeConfig, state: State, on_progress: OnProgress
) -> Calibration:
    """Add to the state, for every offloaded layer, the mean KL(dense || sparse) in nats at each share of ``LADDER`` of
    the configured budget, over the last tokens of every sequence (int64 [N], of one length); gives the header of the
    finished file. The state keeps every sequence's part as soon as it is measured."""
    layers, total = offloaded_layers(model.config), len(sequences)

    def heard(done: int) -> None:
        on_progress(Progress("measuring layers", done, len(layers)))

    for i, ids in enumerate(sequences):
        if _part(i) in state.parts:
            continue
        curves = _curves(model, ids[None], config, len(layers), heard)
        state.keep(_part(i), curves)
        kl = float(curves[:, LADDER.index(1.0)].mean())
        said = f"sequence {i + 1} of {total}: KL {kl:.4g} with one layer at its budget, on average"
        on_progress(Progress("measuring sequences", i + 1, total, said))
    mean = torch.stack([state.parts[_part(i)] for i in range(total)]).mean(0)
    for layer, curve in zip(layers, mean, strict=True):
        figures = {f"kl_at_{share:g}": float(kl) for share, kl in zip(LADDER, curve, strict=True)}
        state.add(layer, LayerResult({curve_name(layer): curve.float()}, figures))
    state.finish()
    return state.header


def _part(sequence: int) -> str:
    return f"sequences.{sequence}.divergence"


def _curves(model: Any, ids: Tensor, config: RuntimeConfig, n_layers: int, on_layer: Callable[[int], None]) -> Tensor:
    """The divergences of each layer for one sequence int64 [1, N], fp64 [n_layers, len(LADDER)]. ``on_layer`` hears how
    many layers are done.

    The tokens before the last two pages are the context. As many as it takes to seal a page follow, then those that are
    tried, which seal none and so can be forgotten after each trial.
    """
    budget, page = config.effective_budget, config.page_size
    settings = config.model_copy(update={"budget": _FULL, "reanchor": None, "gate_recheck": None})
    with OffloadCache(model.config, settings, expected_tokens=ids.shape[1]) as cache:
        prefill(model, cache, ids[:, : -2 * page])
        sealing = cache.offloaded[0].anchors.n_unsealing + 1
        rest = ids[:, -2 * page :]
        for _ in teacher_forced(model, cache, rest[:, :sealing]):
            pass
        tried = rest[:, sealing : sealing + page - 1].to(model.device)
        dense = _tried(model, cache, tried)
        curves = torch.zeros(n_layers, len(LADDER), dtype=torch.float64)
        for place, layer in enumerate(cache.offloaded):
            for step, share in enumerate(LADDER):
                with _only(layer, budget, share):
                    kl = (dense.exp() * (dense - _tried(model, cache, tried))).sum(-1).mean()
                curves[place, step] = kl.double().cpu()
            on_layer(place + 1)
    return curves


def _tried(model: Any, cache: OffloadCache, ids: Tensor) -> Tensor:
    """Log probabilities after each of the tokens, which are forgotten again: fp32 [1, q, vocabulary]."""
    with cache.decoding():
        logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    cache.crop(-ids.shape[1])
    return logits.float().log_softmax(-1)


@contextmanager
def _only(layer: LayerCache, budget: Budget, share: float) -> Iterator[None]:
    """Inside this block this layer alone reads ``share`` of the budget."""
    full = layer.budget
    assert isinstance(full, SliceBudget)
    layer.budget = replace(full, budget=budget, share=share)
    try:
        yield
    finally:
        layer.budget = full
