"""Teacher-forced divergence of one text from dense attention, by a session and without the tasks of a sweep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvoffload.config import RuntimeConfig
from kvoffload.evaluation.tasks.kl import dense_log_probabilities
from kvoffload.evaluation.teacher import teacher_forced
from kvoffload.models.catalog import LoadedModel
from kvoffload.runtime.session import Session
from kvoffload.runtime.stats import Stats


@dataclass(frozen=True)
class Divergence:
    """Over ``n`` positions: mean KL(dense || sparse) in nats with its standard error, share of equal top-1 tokens,
    and what was read and charged per step as shares of the context."""

    kl: float
    kl_stderr: float
    top1: float
    n: int
    read_share: float
    charged_share: float


class DivergenceTask:
    """One text: dense log-probabilities of its last ``n_steps`` tokens, and one prefill that every policy starts
    from."""

    def __init__(self, loaded: LoadedModel, token_ids: list[int], *, n_steps: int, anchors: RuntimeConfig) -> None:
        self._loaded = loaded
        self._prompt, self._continuation = token_ids[:-n_steps], token_ids[-n_steps:]
        self.dense = dense_log_probabilities(loaded.model, token_ids, n_steps)
        self._prefilled = Session(loaded.model, loaded.tokenizer, anchors, expected_tokens=len(token_ids))
        self._prefilled.prefill(self._prompt)

    def close(self) -> None:
        self._prefilled.close()

    def measure(self, config: RuntimeConfig) -> Divergence:
        """One policy, fed token by token (several a forward where that is the same)."""
        expected = len(self._prompt) + len(self._continuation)
        with Session(self._loaded.model, self._loaded.tokenizer, config, expected_tokens=expected) as session:
            session.copy_prefill(self._prefilled)
            ids = torch.tensor([self._continuation])
            blocks = teacher_forced(self._loaded.model, session.cache, ids)
            given = torch.cat([logits[0].log_softmax(-1).cpu() for logits in blocks])
            return _compare(self.dense, given, session.stats())


def _compare(dense: Tensor, given: Tensor, stats: Stats) -> Divergence:
    kl = (dense.exp() * (dense - given)).sum(-1)
    same = dense.argmax(-1) == given.argmax(-1)
    return Divergence(
        kl=float(kl.mean()),
        kl_stderr=float(kl.std(correction=min(1, len(kl) - 1)) / len(kl) ** 0.5),
        top1=float(same.float().mean()),
        n=len(kl),
        read_share=stats.read_share or 0.0,
        charged_share=stats.charged_share or 0.0,
    )
