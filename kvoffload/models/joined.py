"""Projections of the same input as one matrix product in decode steps.

``join`` lays their weights side by side in memory, once; every parameter becomes a view with the name, shape and values
it had. Nothing else of a model changes: ``find_joints`` goes by the addresses, so it finds nothing where weights were
moved since, and only steps that put a joint's parts in the place of its layers' forwards compute one product.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType

import torch
import torch.nn.functional as F  # noqa: N812 - the name torch's own documentation uses
from torch import Tensor, nn

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Joint:
    """Layers of one input whose weights lie side by side. The first that is called computes all outputs, the others
    find theirs; each must be asked for once. Another thread than the one that made it, and who comes with another input
    meanwhile, gets the layer's own product."""

    def __init__(self, layers: Sequence[nn.Linear], weight: Tensor, bias: Tensor | None = None) -> None:
        self.layers, self._weight, self._bias = layers, weight, bias
        self._sizes = [layer.out_features for layer in layers]
        self._thread = threading.get_ident()
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    @property
    def is_unfinished(self) -> bool:
        """Whether an output was computed that nobody asked for."""
        return bool(self._outputs)

    def project(self, place: int, x: Tensor) -> Tensor:
        """What the layer at ``place`` makes of x [..., in], a view [..., out]; torch.compile can follow it."""
        foreign = not torch.compiler.is_compiling() and threading.get_ident() != self._thread
        if foreign or (self._outputs and (x is not self._input or place not in self._outputs)):
            layer = self.layers[place]
            return F.linear(x, layer.weight, layer.bias)
        if not self._outputs:
            outputs = F.linear(x, self._weight, self._bias).split(self._sizes, -1)
            self._input, self._outputs = x, dict(enumerate(outputs))
        output = self._outputs.pop(place)
        if not self._outputs:
            self._input = None
        return output


class Part:
    """One layer of a joint; ``forward`` stands in for the layer's own."""

    def __init__(self, joint: Joint, place: int) -> None:
        self._joint, self._place = joint, place

    def forward(self, input: Tensor) -> Tensor:
        return self._joint.project(self._place, input)


@torch.no_grad()
def join(model: nn.Module) -> None:
    """Lay side by side what reads the same input, group after group, so that no more memory is taken than a group's
    meanwhile. Left as they are: layers that are no plain linear ones (quantised, sharded over devices), that are hooked
    or share weights with others, and whatever there is no memory for. Nothing may run the model meanwhile, or hold
    addresses of its weights (captured graphs)."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for layers in (layers for module in model.modules() for layers in _groups(module)):
        for kind in _parameters(layers):
            if all(uses[id(parameter)] == 1 for parameter in kind) and _span(kind) is None:
                try:
                    _lay_side_by_side(kind)
                except torch.OutOfMemoryError:
                    return


def find_joints(module: nn.Module) -> Iterator[Joint]:
    """The joints among a module's own layers."""
    for layers in _groups(module):
        kinds = _parameters(layers)
        spans = [span for kind in kinds if (span := _span(kind)) is not None]
        if len(spans) == len(kinds):
            yield Joint(layers, *spans)


@contextmanager
def queries_alone(attention: nn.Module) -> Iterator[None]:
    """Inside this block an attention module's queries are a product of their own, and its keys and values, which nobody
    will read, are anything finite. Where their layers are not torch's own or are hooked, nothing is changed."""
    children = dict(attention.named_children())
    layers = [layer for name in _GROUPS[0] if type(layer := children.get(name)) is nn.Linear and not _is_hooked(layer)]
    before = [vars(layer).get("forward") for layer in layers]
    with ExitStack() as undo:
        if len(layers) == len(_GROUPS[0]) and all(given is None or _is_part(given) for given in before):
            for layer, given, forward in zip(layers, before, (nn.Linear.forward, _unread, _unread), strict=True):
                undo.callback(_put_back, layer, given)
                vars(layer)["forward"] = MethodType(forward, layer)
        yield


def _put_back(layer: nn.Module, forward: object) -> None:
    if forward is None:
        del vars(layer)["forward"]
    else:
        vars(layer)["forward"] = forward


def _is_part(forward: object) -> bool:
    return isinstance(getattr(forward, "__self__", None), Part)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _unread(layer: nn.Linear, x: Tensor) -> Tensor:
    """Of the right shape, without a launch."""
    return x[..., :1].expand(*x.shape[:-1], layer.out_features)


def _groups(module: nn.Module) -> Iterator[list[nn.Linear]]:
    children = dict(module.named_children())
    for names in _GROUPS:
        layers = [layer for name in names if isinstance(layer := children.get(name), nn.Linear) and _is_plain(layer)]
        kinds = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in layers}
        if len(layers) == len(names) and len(kinds) == 1:
            yield layers


def _parameters(layers: Sequence[nn.Linear]) -> list[list[Tensor]]:
    """The layers' weights, and their biases if they have some."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    return [weights, biases] if biases else [weights]


def _is_plain(layer: nn.Linear) -> bool:
    """Whether this is torch's own layer with weights of its own, called by nobody else's hooks."""
    hooked = _is_hooked(layer) or "forward" in vars(layer)
    return type(layer) is nn.Linear and not hooked and all(map(_is_dense, layer.parameters()))


def _is_dense(parameter: nn.Parameter) -> bool:
    known = type(parameter) is nn.Parameter and parameter.layout == torch.strided and not parameter.is_meta
    return known and parameter.is_floating_point() and parameter.is_contiguous()


def _lay_side_by_side(parameters: Sequence[Tensor]) -> None:
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    if whole.is_cuda:
        torch.cuda.empty_cache()  # what was freed is too small for the next group


def _span(parameters: Sequence[Tensor]) -> Tensor | None:
    """One tensor [sum of n, ...] over parameters [n, ...], if they follow each other in memory."""
    first, end = parameters[0].detach(), parameters[0].data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != end or _storage(parameter) != _storage(first):
            return None
        end += parameter.nbytes
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
