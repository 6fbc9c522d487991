"""One model in several processes: DDP or FSDP2, batch norm over all images, whole checkpoints.

DDP holds all weights in every process. FSDP2 (`fully_shard`) gives each process a share of every
weight, gradient, average and optimizer state, and gathers a block's weights while it computes.
Checkpoints hold whole tensors either way, so a run may go on in the other one, or in one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from .config import option
from .errors import UsageError
from .optim import OptimConfig
from .runtime import RuntimeConfig, World, is_lost


@dataclass(frozen=True)
class TrainRuntimeConfig(RuntimeConfig):
    """Where and how to train."""

    parallel: str = option(
        "ddp",
        "ddp: all weights in every process; fsdp2: a share of them, for less memory",
        choices=("ddp", "fsdp2"),
        may_change=True,
    )
    sync_bn: bool = option(False, "batch norm over the images of all processes")

    def shards(self, world: World) -> bool:
        """Whether the processes of `world` share the weights."""
        return self.parallel == "fsdp2" and world.size > 1


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch norms of `model` see the images of all processes.

    Args:
        model: Its batch norms are replaced; names and values stay.
        device: PyTorch's own layer has kernels for accelerators only.
    """
    if device.type != "cpu":
        return convert_sync_batchnorm(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _SyncBatchNorm(child))
    return model


def distribute(model: nn.Module, config: TrainRuntimeConfig, world: World) -> nn.Module:
    """What to call in training instead of `model`: the same weights, compiled and parallel."""
    if config.shards(world):
        for block in _blocks(model) if config.compile else ():
            block.compile(dynamic=False)
        return model
    network: Any = torch.compile(model, dynamic=False) if config.compile else model
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices)


def shard(model: nn.Module, config: TrainRuntimeConfig, world: World) -> None:
    """Divide the weights of `model` among the processes, in place, block by block.

    The blocks are the children of all containers called `blocks`, as in timm. In mixed precision
    they are gathered in 16 bits; those with batch norms, whose statistics stay in 32 bits, are
    gathered in 32 and computed under autocast like the rest.
    """
    # FSDP2 takes contiguous weights only; images in NHWC suffice for kernels in NHWC
    model.to(memory_format=torch.contiguous_format)
    mesh = init_device_mesh(world.device.type, (world.size,))
    precision = config.precision(world.device)
    for block in _blocks(model):
        _shard(block, mesh, precision)
    _shard(model, mesh, None)


def average(ema: ModelEmaV3, model: nn.Module, step: int) -> None:
    """Let `ema` follow `model`, each process its share.

    Args:
        ema: The average.
        model: Sharded if the average is.
        step: Steps done.
    """
    pairs = list(zip(_local_values(ema.module), _local_values(model), strict=True))
    moving = [pair for pair in pairs if pair[0].is_floating_point()]
    with torch.no_grad():
        weight = 1 - ema.get_decay(step)
        torch._foreach_lerp_([a for a, _ in moving], [b for _, b in moving], weight)
        for target, value in pairs:
            if not target.is_floating_point():
                target.copy_(value)


@contextlib.contextmanager
def gradient_sync(network: nn.Module, wanted: bool) -> Iterator[None]:
    """Whether backward passes sum gradients over the processes, or keep them for later."""
    with contextlib.ExitStack() as stack:
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(wanted)
        elif isinstance(network, DistributedDataParallel) and not wanted:
            stack.enter_context(network.no_sync())
        yield


@contextlib.contextmanager
def explained(config: OptimConfig) -> Iterator[None]:
    """Say which setting is to blame if an update fails on sharded weights.

    Raises:
        UsageError: The optimizer, or the clipping, needs whole weights.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError) or is_lost(error):
            raise
        raise UsageError(
            f"--optim {config.name} with --clip-mode {config.clip_mode} cannot update sharded "
            "weights: use --parallel ddp, or --optim adamw with --clip-mode norm"
        ) from error


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Have all weights in every process, so that each may call `model` as often as it likes."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def whole(state: Any, *, keep: bool) -> Any:
    """A tree of tensors without shards; every process must ask.

    Args:
        state: A state dict.
        keep: Whether this process needs it; if not, it is spared the memory.
    """

    def gather(value: DTensor) -> Tensor:
        full = value.full_tensor()
        return full.cpu() if keep else value

    return tree_map_only(DTensor, gather, state)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a whole state dict into `model`, sharded or not."""
    target = model.state_dict()
    model.load_state_dict({k: _share(v, target.get(k)) for k, v in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state dict into `optimizer`, whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        index: {name: _share(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": slots})


def _blocks(model: nn.Module) -> list[nn.Module]:
    containers = [m for name, m in model.named_modules() if name.split(".")[-1] == "blocks"]
    return [block for container in containers for block in container.children()]


def _shard(module: nn.Module, mesh: DeviceMesh, precision: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy()
    if precision is not None and not any(isinstance(m, _BatchNorm) for m in module.modules()):
        policy = MixedPrecisionPolicy(precision, torch.float32)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def _share(value: Any, like: Tensor | None) -> Any:
    # counters and scalars of an optimizer are the same in every process
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    # every process has read the whole value; its share must not be a view that keeps it alive
    mesh, value = like.device_mesh, value.to(like.device)
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None).clone()


def _local_values(module: nn.Module) -> list[Tensor]:
    values = module.state_dict().values()
    return [v.to_local() if isinstance(v, DTensor) else v for v in values]


class _SyncBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, in operations that every device has."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        # the tensors themselves: type, device and whether they are frozen
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.training = norm.training
        # timm's BatchNormAct2d
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self._normalize(x) if self.training else super().forward(x)))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""

    def _normalize(self, x: Tensor) -> Tensor:
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        values = x.to(self.weight.dtype)
        mean = _SumOverProcesses.apply(values.sum(axes)) / count
        values = values - mean.view(shape)
        variance = _SumOverProcesses.apply(values.square().sum(axes)) / count
        self._follow(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (values * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        statistics: Any = self
        statistics.running_mean.lerp_(mean, self.momentum)
        statistics.running_var.lerp_(variance, self.momentum)
        statistics.num_batches_tracked += 1


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grad)
