"""The cache that a transformers model is given: the library's own, with its unbounded layers replaced by ours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from kvoffload_storage.file import FileStore
from kvoffload_storage.segments import Sealed
from kvoffload_storage.store import Moved, Store, StoreShape
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvoffload.attention.ahead import LookAhead
from kvoffload.attention.build import build_layer
from kvoffload.attention.layer import LayerCache
from kvoffload.attention.prefetch import Prefetch
from kvoffload.attention.stores import copy_pages, mirror_store, open_store
from kvoffload.cache.slots import Staging
from kvoffload.config import RuntimeConfig
from kvoffload.errors import UnsupportedModelError, UsageError
from kvoffload.geometry import Geometry
from kvoffload.models.anew import Anew
from kvoffload.models.fingerprint import check_loaded
from kvoffload.models.intake import Intake
from kvoffload.models.offload_layer import OffloadLayer
from kvoffload.models.refusals import OneSequenceARow
from kvoffload.models.stages import keep_stage
from kvoffload.policies.base import Freezing
from kvoffload.units import Budget


class OffloadCache(OneSequenceARow, DynamicCache):
    """A DynamicCache whose full-attention layers keep their KV in the configured tier.

    Pass it to ``generate(past_key_values=cache)`` of a model whose attention implementation is ours, and close it (or
    use it in a ``with`` block): files and pinned memory are given back then. One thread at a time.
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: RuntimeConfig, *, expected_tokens: int = 0,
        owned: range | None = None,
    ) -> None:  # fmt: skip
        check_loaded(config.calibrations, model_config)
        super().__init__(config=model_config)
        if not self.layers:
            n_layers = model_config.get_text_config(decoder=True).num_hidden_layers
            self.layers = [DynamicLayer() for _ in range(n_layers)]
            self.layer_class_to_replicate = None
        unbounded = [i for i, layer in enumerate(self.layers) if type(layer) is DynamicLayer]
        if not unbounded:
            raise UnsupportedModelError(
                f"no layer of this {model_config.model_type} model has KV that grows with the context"
            )
        unbounded = keep_stage(self.layers, unbounded, owned, model_config.model_type)
        for place, i in enumerate(unbounded):
            self.layers[i] = OffloadLayer(self, i, place)
        self.n_offloaded = len(unbounded)
        self.config, self.exact, self.stepping, self.rectifies, self.fixed = config, False, False, False, False
        self.policies = [policy.build() for policy in config.policy]
        self._closed = False
        self.broken_off = False  # a step of fixed shapes was, and layers do not agree
        self.anew, self.intake = Anew(self.policies), Intake(self.n_offloaded, self.freezing)
        if self.anew.is_wanted and self.n_offloaded < len(self.layers):
            raise UsageError("policy: layers with bounded KV (sliding windows) do not allow to compute tokens anew")
        self._expected_tokens, self._prefetch = expected_tokens, Prefetch(config.prefetch)
        self._ahead = LookAhead()
        self._stores: dict[StoreShape, Store] = {}
        self._sealed: dict[StoreShape, Sealed] = {}
        self._mirrors: dict[StoreShape, FileStore] = {}
        self.copied_read, self.copied_written = Moved(), Moved()
        self._staging: dict[StoreShape, list[Staging]] = {}
        self.wrap_store: Callable[[Store], Store] = lambda store: store

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def whole_step(self) -> Iterator[None]:
        """What a step of fixed shapes does in all layers: where the block fails, some of them lack what others have."""
        try:
            yield
        except BaseException:
            self.broken_off = True
            raise

    @property
    def offloaded(self) -> list[LayerCache]:
        """The layers whose KV has begun."""
        return [x.kv for x in self.layers if isinstance(x, OffloadLayer) and x.kv is not None]

    @property
    def stores(self) -> list[Store]:
        return list(self._stores.values())

    @property
    def bounded_bytes(self) -> int:
        """Device bytes of the layers that the library keeps itself (sliding windows)."""
        kept = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in kept if isinstance(tensor, Tensor))

    @property
    def notes(self) -> list[str]:
        """What a user should be told: tiers that fall back, and a budget that buys nothing."""
        notes = [store.note for store in self.stores if store.note]
        for layer in [layer for layer in self.offloaded[:1] if layer.n_pages]:
            n_slices, places = layer.budget(layer.n_tokens), layer.fetch.slots.places
            if n_slices == 0 < layer.budget.tokens(layer.n_tokens):
                notes.append(
                    f"the budget of {self.config.effective_budget} buys no page of {self.config.page_size} tokens"
                )
            if places is not None and places < n_slices * layer.geometry.n_sequences:
                notes.append(f"gpu_cache: {places} pages a layer fit, a step selects {n_slices}: none are kept")
        return notes

    @contextmanager
    def prefilling(self, *, whole: bool = False) -> Iterator[None]:
        """Inside this block every forward is exact, also one of a single token. ``whole`` says that the prompt comes in
        one forward, so that layers which were empty are ready after it."""
        self.forget_decoded()
        self.exact, self.intake.whole = True, whole
        try:
            yield
        finally:
            self.exact = self.intake.whole = False
            self.intake.finish()

    @property
    def freezing(self) -> Freezing | None:
        """What prefills freeze of early tokens."""
        return next((policy.freezing for policy in self.policies if policy.freezing is not None), None)

    @contextmanager
    def decoding(self, *, n_revised: int = 0) -> Iterator[None]:
        """Inside this block a forward of several tokens decodes each of them under the budget, as single steps would;
        it may have ``run_length`` tokens, and ``n_revised`` older ones before them that were cropped."""
        self.stepping = True
        for kv in self.offloaded:
            kv.n_revised = n_revised
        try:
            yield
        finally:
            self.stepping = False
            for kv in self.offloaded:
                kv.n_revised = 0

    def run_length(self, limit: int) -> int:
        """How many of the next ``limit`` tokens one forward can decode."""
        limit = self.anew.run_length(limit)
        return min((kv.run_length(limit) for kv in self.offloaded), default=min(limit, 1))

    @contextmanager
    def rectifying(self) -> Iterator[None]:
        """Inside this block a forward of cropped tokens is dense and gives them new keys and values; its reads count as
        decode reads. What readings kept of those tokens is void then."""
        self.rectifies = True
        try:
            yield
        finally:
            self.rectifies = False
            self.anew.note_pass()
            for kv in self.offloaded:
                kv.reading.restart()

    def forget_decoded(self) -> None:
        """Other tokens than decoded ones come, or decoded ones go: policies compute nothing before them anew."""
        self.anew.forget()
        for kv in self.offloaded:
            kv.reading.restart()

    def build(self, index: int, place: int, geometry: Geometry, keys: Tensor, values: Tensor) -> LayerCache:
        """The cache of the model's layer ``index``, the ``place``-th offloaded one; called once by its first
        attention."""
        shape = StoreShape(self.n_offloaded, geometry.rows, geometry.slice_bytes)
        if shape not in self._stores:
            capacity = -(-self._expected_tokens // geometry.page_size)
            opened = open_store(self.config, shape, capacity, keys.device, self._sealed.get(shape))
            self._stores[shape] = self.wrap_store(opened.store)
            self.copied_read += opened.read
            if opened.mirror is not None:
                self._mirrors[shape] = opened.mirror
            n_stagings = 2 if self.config.look_ahead else 1  # slices of one layer come while those of another are read
            self._staging[shape] = [Staging(shape.slice_bytes, keys.device) for _ in range(n_stagings)]
        store, stagings = self._stores[shape], self._staging[shape]
        layer = build_layer(
            self.config, geometry, store, place, model_layer=index, staging=stagings[place % len(stagings)], keys=keys,
            values=values, policies=self.policies, prefetch=self._prefetch,
        )  # fmt: skip
        layer.ahead = self._ahead
        return layer

    def set_budget(self, budget: Budget) -> None:
        """What steps may read from now on, in the layers that have begun and in those to come."""
        self.config = self.config.with_budget(budget)
        for kv in self.offloaded:
            kv.budget = kv.budget.spending(budget)

    def begin_with(self, stores: Sequence[Sealed]) -> None:
        """Layers that are built from now on begin with these pages; their files are closed with this cache."""
        self._sealed = {sealed.shape: sealed for sealed in stores}

    def seal(self, directory: Path, *, n_pages: int | None = None) -> list[Sealed]:
        """Files that hold all sealed pages, or the first ``n_pages`` at least; tiers in memory get some inside
        ``directory``, which grow from call to call."""
        sealed = []
        for shape, store in self._stores.items():
            files = store.seal()
            if files is None:
                mirror = self._mirrors.get(shape) or mirror_store(self.config, directory, shape, None)
                self._mirrors[shape] = mirror
                self.copied_written += copy_pages(store, mirror, n_pages)[1]
                files = mirror.seal()
            sealed.append(files)
        return sealed

    def copy_prefill(self, *sources: "OffloadCache") -> None:
        """Begin with the tokens of another cache of the same model, page size and anchors, whatever its tier and
        policies; those of several single sequences become a batch, padded at the left."""
        if self.freezing is not None:
            raise UsageError(
                "policy prhs: freeze_from changes the prefill, which cannot be one that was made without it"
            )
        same = ("page_size", "sinks", "recent")
        if any(getattr(self.config, name) != getattr(source.config, name) for name in same for source in sources):
            raise UsageError(f"a prefill can only be copied between equal {', '.join(same)}")
        for mine, *theirs in zip(self.layers, *(source.layers for source in sources), strict=True):
            ours = [layer for layer in theirs if isinstance(layer, OffloadLayer)]
            if not isinstance(mine, OffloadLayer) or len(ours) < len(theirs):
                raise UsageError("a prefill with sliding-window or linear layers cannot be copied")
            mine.copy_prefill(ours)

    def check_open(self) -> None:
        """Raise UsageError where this is closed: its memory and the numbers of its files may be others' now."""
        if self._closed:
            raise UsageError("this session is closed: open another one, or restore what was saved")

    def close(self) -> None:
        """Give back memory, files and threads; a second call does nothing."""
        self._closed = True
        for store in (*self._stores.values(), *self._mirrors.values()):
            store.close()
