"""Several processes that run one model, as torchrun starts them: transformers shards the weights, and every rank keeps
its own kv heads (tensor parallelism) or layers (pipeline parallelism) in tiers of its own.

Importing this loads neither torch nor transformers.
"""

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvoffload.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_TORCHRUN = "TORCHELASTIC_RUN_ID"  # set by torchrun alone


@dataclass(frozen=True)
class Ranks:
    """This process among those that run one model; alone unless torchrun started several.

    ``tp_size`` ranks share every layer's heads, or ``pp_size`` ranks follow each other layer by layer. What is said
    between ranks goes over a gloo group in host memory: no device waits for it. All ranks make the same calls in the
    same order; a rank that fails ends, and torchrun ends the others.
    """

    rank: int = 0
    tp_size: int = 1
    pp_size: int = 1
    local_rank: int = 0
    on_host: int = 1
    group: Any = field(default=None, compare=False)

    @property
    def count(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def several(self) -> bool:
        return self.count > 1

    def device(self, name: str) -> "torch.device":
        """The rank's own device; raises UsageError where another one was asked for."""
        import torch

        cuda = torch.cuda.is_available()
        if name not in ("auto", "cuda" if cuda else "cpu"):
            raise UsageError(f"device: under torchrun every rank has its own, leave {name!r} out")
        if cuda and self.local_rank >= torch.cuda.device_count():
            raise UsageError(f"torchrun: {self.on_host} processes and {torch.cuda.device_count()} CUDA devices")
        return torch.device("cuda", self.local_rank) if cuda else torch.device("cpu")

    def check_model(self, config: "PreTrainedConfig") -> None:
        """Raise UnsupportedModelError where heads or layers cannot be shared out evenly enough."""
        text = config.get_text_config(decoder=True)
        n_heads, n_layers = text.num_attention_heads, text.num_hidden_layers
        for what, n in (("kv heads", getattr(text, "num_key_value_heads", None) or n_heads), ("heads", n_heads)):
            if n % self.tp_size:
                raise UnsupportedModelError(
                    f"{n} {what} of {config.model_type} cannot be shared out to {self.tp_size} ranks; "
                    f"--pp-size {self.count} shares out its layers"
                )
        if n_layers < self.pp_size:
            raise UnsupportedModelError(f"{n_layers} layers cannot be shared out to {self.pp_size} ranks")

    def joined(self) -> "Ranks":
        """With the group over which ranks talk; all of them have to come here."""
        import torch
        import torch.distributed as dist

        if not self.several or self.group is not None:
            return self
        device = self.device("auto")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return replace(self, group=dist.new_group(backend="gloo"))

    def leave(self) -> None:
        """Nothing is said any more."""
        import torch.distributed as dist

        if self.several and dist.is_initialized():
            dist.destroy_process_group()

    def largest(self, code: int) -> int:
        """The largest of what the ranks say."""
        import torch
        import torch.distributed as dist

        if not self.several:
            return code
        told = torch.tensor([code])
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return int(told)

    def first(self, number: int) -> int:
        """What rank 0 says."""
        import torch
        import torch.distributed as dist

        if not self.several:
            return number
        told = torch.tensor([number])
        dist.broadcast(told, 0, group=self.group)
        return int(told)

    def all(self, value: Any) -> list[Any]:
        """What every rank says, in order."""
        import torch.distributed as dist

        if not self.several:
            return [value]
        told = [None] * self.count
        dist.all_gather_object(told, value, group=self.group)
        return told

    def loading(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told, so that it loads this rank's part of the weights."""
        return {"distributed_config": self._distributed()}

    def split(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """A whole model on this rank's device, cut down to this rank's part of it."""
        cls: Any = type(model)
        distributed, _, mesh = cls.prepare_distribute_model(self._distributed())
        part: PreTrainedModel = cls.maybe_distribute_model(model, distributed, mesh)
        return part

    def _distributed(self) -> Any:
        try:
            from transformers.distributed.configuration_utils import DistributedConfig

            return DistributedConfig(tp_size=self.tp_size, pp_size=self.pp_size)
        except (ImportError, TypeError):
            raise UsageError("several ranks need transformers 5.17 or newer (its DistributedConfig)") from None


ALONE = Ranks()


def find_ranks(pp_size: int = 1) -> Ranks:
    """This process's place as torchrun tells it; raises UsageError if ``pp_size`` does not fit the processes."""
    count = int(os.environ.get("WORLD_SIZE", "1")) if _TORCHRUN in os.environ else 1
    if pp_size not in (1, count):  # transformers 5.23 fails to load the tensor parallel layers of other stages
        raise UsageError(f"pp_size: {pp_size} is neither 1 nor the {count} processes that torchrun started")
    if count == 1:
        return ALONE
    here = {name: int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    return Ranks(here["RANK"], count // pp_size, pp_size, here["LOCAL_RANK"], here["LOCAL_WORLD_SIZE"])


def check_alone(command: str) -> None:
    """Raise UsageError where torchrun started several processes of a command that runs in one."""
    if find_ranks().several:
        raise UsageError(f"{command} runs in one process: start it without torchrun")


def stage_layers(model: Any) -> range | None:
    """The layers that this pipeline stage runs; None where every rank runs all of them."""
    stage = getattr(model, "_pp_stage", None)
    if stage is None:
        return None
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return range(*stage.layer_range_for_rank(stage.pp_rank, n_layers))
