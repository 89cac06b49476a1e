"""Scores of continuations: dense at a full budget, those of single steps under a small one, whatever the batch."""

import pytest
import torch

from kvoffload.config import RuntimeConfig
from kvoffload.harness.scoring import Question, score
from kvoffload.runtime.engine import Runtime

SMALL = {"sinks": 4, "recent": 8, "page_size": 4, "self_test": False}


def draw(n, seed):
    return tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


QUESTIONS = [Question(draw(90, c), draw(n, 10 * c + n)) for c, n in ((0, 5), (1, 1), (0, 1), (0, 30), (1, 7))]
QUESTIONS += [Question((7,), draw(n, n)) for n in (1, 60)]


def scores(loaded, *, batch=8, **fields):
    config = Runtime(loaded, RuntimeConfig(**(SMALL | fields))).config
    return dict(score(loaded, config, QUESTIONS, batch=batch))


def expected(logits, continuation):
    """Log-likelihood and greediness from logits [n, vocabulary] of a continuation."""
    wanted = torch.tensor(continuation)
    chosen = logits.log_softmax(-1).gather(-1, wanted[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == wanted).all())


def test_a_full_budget_gives_the_dense_likelihood(loaded, stock):
    given = scores(loaded, budget="100%")
    for i, question in enumerate(QUESTIONS):
        ids = torch.tensor([[*question.context, *question.continuation]])
        with torch.no_grad():
            logits = stock.model(ids, use_cache=False).logits[0, len(question.context) - 1 : -1]
        total, greedy = expected(logits, question.continuation)
        assert given[i].log_likelihood == pytest.approx(total, abs=1e-3)
        assert given[i].is_greedy == greedy


@pytest.mark.parametrize("budget", ["10%", "100%"])
def test_scores_do_not_depend_on_the_batch(loaded, budget):
    one, three = (scores(loaded, budget=budget, batch=batch) for batch in (1, 3))
    assert one.keys() == three.keys() == set(range(len(QUESTIONS)))
    for i, alone in one.items():
        assert alone.log_likelihood == pytest.approx(three[i].log_likelihood, abs=1e-3)


def test_every_token_is_scored_by_a_step_under_the_budget(loaded):
    """The first one too: the context's last token is fed."""
    given = scores(loaded, budget="10%")
    question = QUESTIONS[0]
    with Runtime(loaded, RuntimeConfig(**SMALL, budget="10%")).session() as session:
        session.prefill(list(question.context[:-1]))
        steps = [session.step(token) for token in (question.context[-1], *question.continuation[:-1])]
    total, _ = expected(torch.stack(steps), question.continuation)
    assert given[0].log_likelihood == pytest.approx(total, abs=1e-3)
    dense = scores(loaded, budget="100%")
    assert abs(dense[0].log_likelihood - total) > 0.01


def test_the_likeliest_continuation_is_greedy(loaded):
    config = Runtime(loaded, RuntimeConfig(**SMALL, budget="10%")).config
    context = draw(90, 0)
    with Runtime(loaded, config).session() as session:
        session.prefill(list(context[:-1]))
        tokens = [int(session.step(context[-1]).argmax())]
        tokens += [int(session.step(tokens[-1]).argmax())]
    asked = [Question(context, (*tokens, 5)[:n]) for n in (2, 3)]
    found = dict(score(loaded, config, asked, batch=2))
    assert found[0].is_greedy
    assert found[1].is_greedy == (int(session_next(loaded, config, context, tokens)) == 5)


def session_next(loaded, config, context, tokens):
    with Runtime(loaded, config).session() as session:
        session.prefill(list(context[:-1]))
        return [session.step(token) for token in (context[-1], *tokens)][-1].argmax()


def test_reads_are_counted_within_the_budget(loaded):
    found = scores(loaded, budget="10%", completion="none")
    assert all(0 < found[i].reads.read <= 0.1 * found[i].reads.context + 1 for i in range(5))
