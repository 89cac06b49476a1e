"""What lies between a model's matrix products in decode steps (norms, residuals, activations, rotary embeddings), fused
by torch.compile: about five kernels a layer instead of fifty.

Only steps of fixed shapes come here, and only while ``Glue.step`` is open is anything of the model replaced. A decoder
layer is compiled as a whole with its attention, and whatever else is not a plain dense MLP, left outside: two regions,
in front of the attention and behind it, and their matrix products stay the library's calls. What only the attention
reads (cache, mask, positions) passes by the compiled code, so that it never depends on it. Every piece is compared with
what it replaces when it runs first; one that fails, or is wrong, is left to the model from then on. Inside and outside
of compiled code, layers whose weights joined.py laid side by side are one product.
"""

import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kvoffload.models.joined import Joint, Part, find_joints

Forward = Callable[..., Any]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_PASSED_BY = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "past_key_value", "cache_position", "position_embeddings")
)
_OPTIONS = {  # as far as this torch knows them
    "emulate_precision_casts": True,  # what is bf16 between two operations of the model stays rounded
    "deterministic": True,  # nothing is chosen by timing it
    "compile_threads": 1,  # no pool of processes for a dozen kernels
}
_PLAIN = (nn.Linear, nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm)
_COUNT = count()
_LOCK = threading.RLock()  # one thread at a time has models changed


@dataclass
class _Call:
    """A call of a layer: what passes by the compiled code, and what the parts outside it were given and gave, so that
    each runs once whatever becomes of that code."""

    passed_by: dict[str, Any]
    told: dict[int, dict[str, Any]] = field(default_factory=dict)
    given: dict[int, Any] = field(default_factory=dict)
    error: BaseException | None = None
    differs: bool = False


class _Local(threading.local):
    """Whether this thread is in a step, and may compile there, and the layer that it is in."""

    active = compiles = False
    call: _Call | None = None
    pieces: dict[Any, "_Piece"] = {}  # noqa: RUF012 - never changed in place


_LOCAL = _Local()


def _run_part(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A part of a layer that stays outside compiled code: its own forward, with what was passed by."""
    call, forward = _LOCAL.call, type(module).forward
    if call is None:
        return forward(module, *args, **kwargs)
    kwargs = {name: call.passed_by.get(name) if value is None else value for name, value in kwargs.items()}
    known, told = id(module), {name: kwargs.get(name) for name in _PASSED_BY}
    if known in call.given:
        call.differs |= any(told[name] is not value for name, value in call.told[known].items())
        return call.given[known]
    try:
        call.told[known], call.given[known] = told, forward(module, *args, **kwargs)
    except BaseException as error:
        call.error = error
        raise
    return call.given[known]


class _Piece:
    """Something that is compiled once for all modules of a class; ``refusal`` says why it is not any more."""

    def __init__(self, plain: Forward) -> None:
        self.plain, self.refusal, self.is_checked = plain, "", False

    @cached_property
    def compiled(self) -> Forward:
        """Raises whatever a compiler that is not there does."""
        known = torch._inductor.list_options()
        options: dict[str, Any] = {name: value for name, value in _OPTIONS.items() if name in known}
        return torch.compile(_own(self.plain), options=options)

    @property
    def is_usable(self) -> bool:
        """Here and now."""
        return _LOCAL.active and not self.refusal and (self.is_checked or _LOCAL.compiles)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_usable:
            return self.plain(*args, **kwargs)
        try:
            given = self.compiled(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - compilers fail in many ways, and the model goes on without
            return self._refused(error, args, kwargs)
        return given if self.is_checked else self._check(given, self.plain(*args, **kwargs))

    def _refused(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.refusal = next(iter(str(error).splitlines()), "") or type(error).__name__
        return self.plain(*args, **kwargs)

    def _check(self, given: Any, expected: Any, *, differs: bool = False) -> Any:
        """``given``, or ``expected`` where they differ by more than rounding."""
        leaves, others = tree_leaves(given), tree_leaves(expected)
        if differs or len(leaves) != len(others) or not all(map(_alike, leaves, others)):
            self.refusal = "its results differ"
            return expected
        self.is_checked = True
        return given


class _Layer(_Piece):
    """A decoder layer without its attention."""

    def __init__(self, plain: Forward) -> None:
        super().__init__(plain)
        self._names = list(inspect.signature(plain).parameters)[1:]

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.is_usable:
            return self.plain(layer, *args, **kwargs)
        named = dict(zip(self._names, args, strict=False)) | kwargs
        passed_by = {name: value for name, value in named.items() if name in _PASSED_BY}
        _LOCAL.call = call = _Call(passed_by)
        try:
            return self._call(call, named, (layer, *args), kwargs)
        finally:
            _LOCAL.call = None

    def _call(self, call: _Call, named: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            given = self.compiled(args[0], **(named | dict.fromkeys(call.passed_by)))
        except Exception as error:
            if call.error is not None:  # not the compiler's
                raise
            return self._refused(error, args, kwargs)
        if self.is_checked:
            return given
        expected = self.plain(*args, **kwargs)
        return self._check(given, expected, differs=call.differs)


class Glue:
    """The pieces of one model, and its joints (see joined.py). ``note`` says what is compiled, and what is not and why;
    ``seconds`` is the time of the steps in which something was."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._pieces: dict[Any, _Piece] = {}  # of classes, and of functions by their module and name
        self._outside = torch.compiler.disable(_run_part)
        self._apart: set[type[nn.Module]] = set()  # who asks for some of a joint's outputs only
        self.seconds, self._n_joints = 0.0, 0

    @property
    def note(self) -> str:
        """Such as "LlamaDecoderLayer, LlamaRMSNorm in 4.1 s; not apply_rotary_pos_emb: ..."."""
        tried = {_name(key): piece.refusal for key, piece in self._pieces.items() if piece.refusal or piece.is_checked}
        good = ", ".join(name for name, refusal in tried.items() if not refusal)
        told = [f"{good} in {self.seconds:.1f} s"] if good else []
        told += [f"{self._n_joints} products of joined weights"] if self._n_joints else []
        return "; ".join(told + [f"not {name}: {refusal}" for name, refusal in tried.items() if refusal])

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside this block the model's decode steps of fixed shapes, in this thread, go through compiled code; what is
        not compiled yet will be, but not while a graph is captured."""
        captured = _is_captured()
        with _LOCK, ExitStack() as undo:
            before, started = _n_graphs(), time.perf_counter()
            if captured:
                undo.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            self._install(undo)
            joints = self._join(undo)
            _LOCAL.active, _LOCAL.compiles, _LOCAL.pieces = True, not captured, self._pieces
            try:
                yield
            finally:
                _LOCAL.active, _LOCAL.compiles, _LOCAL.pieces = False, False, {}
                self._apart |= {cls for cls, joint in joints if joint.is_unfinished}
                if _n_graphs() > before:
                    self.seconds += time.perf_counter() - started

    def _install(self, undo: ExitStack) -> None:
        """Put every piece in its place."""
        model = self._model()
        assert model is not None, "it is running"
        covered: set[nn.Module] = set()  # by a layer's own piece
        for module in model.modules():
            self._replace_rotary(module, undo)
            if module in covered or "forward" in vars(module):
                continue
            outside = _parts_outside(module)
            if outside and not self._is_refused(type(module)):
                self._replace(module, partial(self._piece(module, _Layer), module), undo)
                for part in outside:
                    self._replace(part, MethodType(self._outside, part), undo)
                for child in module.children():
                    if child not in outside:
                        covered.update(child.modules())
            elif _is_norm(module) or _is_mlp(module):
                self._replace(module, partial(self._piece(module, _Piece), module), undo)
                covered.update(module.modules())

    def _join(self, undo: ExitStack) -> list[tuple[type[nn.Module], Joint]]:
        """Put one product in the place of several wherever weights lie side by side; the joints with whose they are."""
        model = self._model()
        assert model is not None, "it is running"
        joints = [(type(m), joint) for m in model.modules() if type(m) not in self._apart for joint in find_joints(m)]
        for _, joint in joints:
            for place, layer in enumerate(joint.layers):
                self._replace(layer, Part(joint, place).forward, undo)
        self._n_joints = len(joints)
        return joints

    def _is_refused(self, key: Any) -> bool:
        return key in self._pieces and bool(self._pieces[key].refusal)

    def _piece(self, module: nn.Module, kind: type[_Piece]) -> _Piece:
        cls = type(module)
        if cls not in self._pieces:
            self._pieces[cls] = kind(cls.forward)
        return self._pieces[cls]

    @staticmethod
    def _replace(module: nn.Module, forward: Any, undo: ExitStack) -> None:
        undo.callback(vars(module).pop, "forward", None)
        vars(module)["forward"] = forward

    def _replace_rotary(self, module: nn.Module, undo: ExitStack) -> None:
        """The functions of the modeling file by which an attention rotates queries and keys."""
        if not type(module).__name__.endswith("Attention"):
            return
        file, code = sys.modules[type(module).__module__], getattr(type(module).forward, "__code__", None)
        for name in () if code is None else code.co_names:
            function = getattr(file, name, None)
            if name.startswith("apply_rotary") and isinstance(function, FunctionType):
                key = (file.__name__, name)
                if key not in self._pieces:
                    self._pieces[key] = _Piece(function)
                setattr(file, name, self._pieces[key])  # no function: the next attention finds it done
                undo.callback(setattr, file, name, function)


_GLUES: WeakKeyDictionary[nn.Module, Glue] = WeakKeyDictionary()


def has_glue(model: Any, compile: str) -> bool:
    """Whether anything of a model is to be compiled: only if "on", and on devices with graphs."""
    return compile == "on" and bool(model.device.type == "cuda")


def glue_of(model: Any, compile: str) -> Glue | None:
    """A model's glue, one for all its caches; None where nothing is to be compiled."""
    if not has_glue(model, compile):
        return None
    if model not in _GLUES:
        _GLUES[model] = Glue(model)
    return _GLUES[model]


def fused(glue: Glue | None) -> AbstractContextManager[None]:
    """Inside this block the model is compiled as far as there is glue for it."""
    return nullcontext() if glue is None else glue.step()


def run(module: nn.Module, x: Tensor) -> Tensor:
    """A module's forward, compiled where this step has compiled others of its class."""
    piece = _LOCAL.pieces.get(type(module))
    given: Tensor = module(x) if piece is None or isinstance(piece, _Layer) else piece(module, x)
    return given


def _is_captured() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _own(function: Forward) -> Forward:
    """The same function with a code object and a name of its own: neither what is compiled for one model nor which
    sizes were seen to change is another's. What transformers wraps layers in for training is taken off."""
    while isinstance(function, FunctionType) and function.__code__.co_name == "forward_with_checkpointing":
        function = inspect.getattr_static(function, "__wrapped__")
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_COUNT)}")
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _n_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _alike(given: Any, expected: Any) -> bool:
    if not (isinstance(given, Tensor) and isinstance(expected, Tensor)):
        return type(given) is type(expected)
    if given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    error = (given.float() - expected.float()).abs().max()
    return bool(error <= _TOLERANCE.get(given.dtype, 0.0) * expected.float().abs().max())


def _name(key: Any) -> str:
    return key.__name__ if isinstance(key, type) else str(key[1])


def _parts_outside(module: nn.Module) -> list[nn.Module]:
    """Of a decoder layer, its attention and what else is no plain module; nothing of other modules."""
    children = list(module.children())
    if not any(type(child).__name__.endswith("Attention") for child in children):
        return []
    outside = [child for child in children if not (_is_plain(child) or _is_norm(child) or _is_mlp(child))]
    return [] if any("forward" in vars(inner) for inner in module.modules()) else outside


def _is_norm(module: nn.Module) -> bool:
    """A model's own norm, of several operations."""
    cls = type(module)
    return cls.__name__.endswith(("RMSNorm", "LayerNorm")) and not cls.__module__.startswith("torch.")


def _is_mlp(module: nn.Module) -> bool:
    """A dense MLP: matrix products and activations."""
    return type(module).__name__.endswith("MLP") and all(_is_plain(child) for child in module.children())


def _is_plain(module: nn.Module) -> bool:
    activation = type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    return type(module) in _PLAIN or (activation and not list(module.parameters()))
