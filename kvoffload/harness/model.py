"""The model ``kvoffload`` of lm-evaluation-harness: every request goes through the runtime, under its budget.

Importing this registers it: ``lm_eval.simple_evaluate(model="kvoffload", model_args="pretrained=NAME,budget=5%")``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from kvoffload.config import SamplingConfig
from kvoffload.errors import UsageError
from kvoffload.harness.scoring import Question, score
from kvoffload.runtime.engine import Runtime
from kvoffload.runtime.stats import Reads

_SAMPLING = ("temperature", "top_p", "top_k", "seed")
_SETTLED = {"do_sample": (True, False), "num_beams": (1,), "repetition_penalty": (1.0,)}
"""Other arguments of a generation, and the values that change nothing."""


@register_model("kvoffload")
class KvoffloadLM(TemplateLM):
    """``pretrained`` is any name that ``kvoffload generate --model`` takes, other arguments are fields of
    RuntimeConfig; or give a ``runtime``. ``batch_size`` choices of one question share a forward. ``max_length`` tokens
    at most are read of a prompt, its newest ones; the model's own limit unless given."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        runtime: Runtime | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        **config: Any,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (runtime is None):
            raise UsageError("model kvoffload: give either pretrained or runtime")
        self.runtime = runtime or Runtime.from_pretrained(str(pretrained), **config)
        loaded = self.runtime.loaded
        if loaded is None:
            raise UsageError("model kvoffload: this runtime has no model of its own")
        self._loaded, self.tokenizer, self._device = loaded, loaded.tokenizer, loaded.model.device
        self.batch_size = int(batch_size)
        limit = loaded.config.get_text_config(decoder=True).max_position_embeddings
        self.max_length, self.max_gen_toks = int(max_length or limit), max_gen_toks
        self.reads: list[Reads] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text and stands before an empty context; 0 where a tokenizer has none."""
        tokenizer = self.tokenizer
        found = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
        return next((token for token in found if token is not None), 0)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the tokenizer does it unless told; a beginning that is written out is not doubled."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options).input_ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        questions = [self._question(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(questions)
        asked = score(self._loaded, self.runtime.config, questions, batch=self.batch_size)
        for i, given in tqdm(asked, total=len(questions), desc="kvoffload", disable=disable_tqdm):
            found[i] = (given.log_likelihood, given.is_greedy)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
            self._count(given.reads)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Windows of ``max_length`` tokens that are scored once each."""
        windows = [self._windows(instance.args[0]) for instance in requests]
        scored = iter(self._loglikelihood_tokens([w for part in windows for w in part], disable_tqdm=disable_tqdm))
        return [sum(next(scored)[0] for _ in part) for part in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One session a request."""
        return [self._generate(*instance.args) for instance in tqdm(requests, desc="kvoffload", disable=disable_tqdm)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UsageError(f"model {self._loaded.name!r} has no chat template: leave --apply-chat-template out")
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        return str(self.tokenizer.apply_chat_template(chat_history, **options))

    @property
    def tokenizer_name(self) -> str:
        return self._loaded.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What ``results["config"]`` says beside what was asked for."""
        config = self.runtime.config.model_dump(mode="json") | {"budget": str(self.runtime.config.effective_budget)}
        return {"pretrained": self._loaded.name, "runtime": config, **self.costs()}

    def costs(self) -> dict[str, float | None]:
        """Shares of the context that a step read and was charged, the mean of all requests whose steps had pages."""
        n, reads = len(self.reads), self.reads
        return {
            "read_share": sum(r.read / r.context for r in reads) / n if n else None,
            "charged_share": sum(r.charged / r.context for r in reads) / n if n else None,
        }

    def _question(self, context: list[int], continuation: list[int]) -> Question:
        """The newest tokens that fit; at least one is context."""
        if not continuation:
            raise UsageError("a task has an empty continuation: there is nothing to score")
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise UsageError(f"a continuation of {len(continuation)} tokens is longer than {self.max_length} allow")
        return Question(tuple(context[-room:]), tuple(continuation))

    def _windows(self, text: str) -> list[tuple[None, list[int], list[int]]]:
        ids = self.tok_encode(text)
        cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [(None, *make_disjoint_window(window)) for window in cut]

    def _generate(self, prompt: str, options: Mapping[str, Any]) -> str:
        sampling = _sampling(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise UsageError(f"max_gen_toks {sampling.max_new_tokens} leave no room for a prompt in {self.max_length}")
        ids = self.tok_encode(prompt)[-room:]
        with self.runtime.session(expected_tokens=len(ids) + sampling.max_new_tokens) as session:
            session.prefill(ids)
            text = session.generate(sampling)
            self._count(Reads.of(session.cache.offloaded))
        self.cache_hook.add_partial("generate_until", (prompt, options), text)
        return text

    def _count(self, reads: Reads | None) -> None:
        if reads is not None:
            self.reads.append(reads)


def _sampling(options: Mapping[str, Any]) -> SamplingConfig:
    """Raises UsageError for arguments that are not followed."""
    until = [text for text in options.get("until", []) if text]
    known = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    for name in options.keys() - {"until", "max_gen_toks", *_SAMPLING}:
        if options[name] not in _SETTLED.get(name, ()):
            raise UsageError(f"a task generates with {name}={options[name]!r}, which kvoffload does not do")
    return SamplingConfig(max_new_tokens=options["max_gen_toks"], stop=tuple(until), **known)
