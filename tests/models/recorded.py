"""What a CUDA graph does, on a CPU: the operations of a step are recorded without being run, and replayed on the same
tensors. As there, memory that moves and numbers that the host computes are not seen by a replay, and whatever needs the
host's answer cannot be recorded."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kvoffload.repeats import interruptible

aten = torch.ops.aten
NEEDS_THE_HOST = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.is_nonzero,
    aten._unique2,
    aten.bincount,
)


def tensors(values):
    if isinstance(values, torch.Tensor):
        return [values]
    return [value for value in tree_flatten(values)[0] if isinstance(value, torch.Tensor)]


def is_written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


class Recorder(TorchDispatchMode):
    """Notes every operation, and what tensors held before it wrote to them."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        bools = func.overloadpacket is aten.index and any(t.dtype == torch.bool for t in tensors(args[1]))
        if func.overloadpacket in NEEDS_THE_HOST or bools:
            raise RuntimeError(f"{func} needs the host")
        places = {argument.name: i for i, argument in enumerate(func._schema.arguments) if is_written(argument)}
        written = [kwargs.get(name, args[i] if i < len(args) else None) for name, i in places.items()]
        self.before += [(tensor, tensor.clone()) for tensor in tensors(written)]
        given = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        made = [tensor if tensor.untyped_storage().data_ptr() not in known else None for tensor in tensors(given)]
        if written or any(tensor is not None for tensor in made):  # else it is a view
            self.calls.append((func, args, kwargs, made))
        return given

    def cut(self, work):
        """Work of the host, which replays do in its place."""
        self.calls.append((work, (), {}, []))

    def undo(self):
        for tensor, held in reversed(self.before):
            tensor.copy_(held)
        self.before = []

    def replay(self):
        for func, args, kwargs, made in self.calls:
            given = func(*args, **kwargs)
            for old, new in zip(made, tensors(given) if made else [], strict=True):
                if old is not None:
                    old.copy_(new)


def record(call, generators):
    """A ``Capture``."""
    states = [generator.get_state() for generator in generators]
    recorder = Recorder()
    with recorder, interruptible(recorder):
        stepped = call()
    recorder.undo()
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return stepped, recorder.replay
