"""Weights and work that ranks share: whole neurons from shards, the rows a rank owns, one reduction for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hsu._neurons.rules import neurons_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Gathered = dict[int, Tensor]
"""Whole parameters by the id of the sharded one: within one use each is gathered once."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The neurons of one target at one time.

    Args:
        x: The effective neurons, (n, d) or (groups, n, d), whole on every rank; differentiable where gradients are recorded.
        parameter: The parameter of which x is a view; None if x is computed.
    """

    x: Tensor
    parameter: nn.Parameter | None


@dataclass(frozen=True, eq=False)
class Replicas:
    """The ranks that hold the same model and train it alike.

    Args:
        group: Their process group.
        split_above: Layers of at least so many neurons are computed by all of them together.
    """

    group: ProcessGroup
    split_above: int

    @property
    def rank(self) -> int:
        """Number of this rank in the group."""
        return torch.distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return torch.distributed.get_world_size(self.group)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what Fabric and DDP put around it."""
    inner: Any = model
    if type(model).__name__ == "_FabricModule":
        inner = model._forward_module
    elif isinstance(model, nn.parallel.DistributedDataParallel):
        inner = model.module
    return model if inner is model else unwrapped(inner)


def is_sharded(p: Tensor) -> bool:
    """Whether a tensor is a DTensor: a rank holds a part, or a copy, of it."""
    return hasattr(p, "full_tensor")


def whole(x: Any) -> Tensor:
    """All of a tensor, gathered where it is sharded: a collective call then."""
    found: Tensor = x.full_tensor() if is_sharded(x) else x
    return found


def local(x: Any) -> Tensor:
    """The part of a tensor that this rank holds."""
    found: Tensor = x.to_local() if is_sharded(x) else x
    return found


def read_neurons(module: nn.Module, gathered: Gathered | None = None) -> dict[str, Reading]:
    """Read a module's neurons, by name, whole on every rank: a collective call where its parameters are sharded."""
    if not (_many_ranks() and any(map(is_sharded, module.parameters()))):
        return {key: Reading(x, _origin(x, {})) for key, x in neurons_of(module).items()}
    gathered = {} if gathered is None else gathered
    sharded: dict[str, Any] = {name: p for name, p in module.named_parameters() if is_sharded(p)}
    for p in sharded.values():
        if id(p) not in gathered:
            gathered[id(p)] = p.full_tensor()
    found = _with_parameters(module, {name: gathered[id(p)] for name, p in sharded.items()})
    origins = {id(_base(gathered[id(p)])): p for p in sharded.values()}
    return {key: Reading(x, _origin(x, origins)) for key, x in found.items()}


def parameters_behind(module: nn.Module, key: str) -> list[nn.Parameter]:
    """The parameters of a module from which its neurons are computed, trained or frozen: collective where they are sharded."""
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    with torch.enable_grad():
        leaves = {name: whole(p.detach()).requires_grad_() for name, p in named.items()}
        x = _with_parameters(module, leaves)[key]
        if not x.requires_grad:
            return []
        found = torch.autograd.grad(x, list(leaves.values()), torch.ones_like(x), allow_unused=True)
    return [p for p, part in zip(named.values(), found, strict=True) if part is not None]


def own_rows(module: nn.Module, key: str) -> Tensor | None:
    """Neurons of which this rank holds some part, a mask (n) or (groups, n); None where it needs the gradient of all.

    Every rank's parts are marked with its number and gathered; the rule then says where they go.
    """
    sharded = [p for p in module.parameters() if is_sharded(p)]
    if not sharded or read_neurons(module)[key].parameter is None:
        return None
    rank = torch.distributed.get_rank()
    marks: Gathered = {id(p): _marked(p, rank) for p in sharded}
    rows = (read_neurons(module, marks)[key].x == rank).any(-1)
    return None if bool(rows.all()) else rows


@contextmanager
def whole_parameters(root: nn.Module | None, *, with_grads: bool) -> Iterator[None]:
    """Under FSDP1 every rank holds all parameters, and gradients where asked for, and writes its own part back."""
    if root is None:
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(
        root, with_grads=with_grads, writeback=with_grads
    ):
        yield


def flat_sharded(model: nn.Module) -> bool:
    """Whether FSDP1 holds parts of the model in flat pieces.

    Raises:
        NotImplementedError: if it was not told to keep the original parameters.
    """
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    if not any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return False
    if any(
        getattr(p, "_is_flat_param", False) for p in model.parameters()
    ):  # as torch's isinstance asks
        raise NotImplementedError(
            "FSDP has flattened the weights of this model into pieces without rows, where no neuron can be found: use "
            "FSDPStrategy(use_orig_params=True), or ModelParallelStrategy"
        )
    return True


def sum_over_ranks(parts: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """Sum tensors over ranks in one reduction for each device and dtype; every rank gets the same bits."""
    kinds: dict[Any, list[int]] = {}
    for i, part in enumerate(parts):
        kinds.setdefault((part.device, part.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for members in kinds.values():
        flat = torch.cat([parts[i].flatten() for i in members])
        torch.distributed.all_reduce(flat, group=group)
        pieces = torch.split(flat, [parts[i].numel() for i in members])
        found |= {i: piece.view(parts[i].shape) for i, piece in zip(members, pieces, strict=True)}
    return [found[i] for i in range(len(parts))]


def norm_of(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of several tensors together, shards included: a collective call where there are some."""
    norms = [whole(torch.linalg.vector_norm(part, dtype=_working(part))) for part in parts]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def any_holder(mask: Tensor, p: Any) -> Tensor:
    """Whether any of the ranks that hold a sharded parameter p says so, entry by entry; a collective call then."""
    if not is_sharded(p):
        return mask
    found = mask.to(torch.uint8)
    for axis in range(p.device_mesh.ndim):
        torch.distributed.all_reduce(
            found, torch.distributed.ReduceOp.MAX, group=p.device_mesh.get_group(axis)
        )
    return found.bool()


def leaves_of(loss: Tensor) -> set[int]:
    """Ids of the parameters on which a loss depends."""
    reached, waiting = set[Any](), [loss.grad_fn]
    leaves = set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            leaves.add(id(variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


def reshard(model: nn.Module) -> None:
    """Let FSDP2 take back the weights that it left whole after the forward pass, in the precision of that."""
    for module in model.modules():
        if (take_back := getattr(type(module), "reshard", None)) is not None:
            take_back(module)


def _many_ranks() -> bool:
    """Whether this process is one of several, or may be."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _with_parameters(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's neurons where tensors stand in the place of some parameters."""
    found: dict[str, Tensor] = functional_call(
        _Rule(module), {f"module.{name}": x for name, x in given.items()}, ()
    )
    return found


class _Rule(nn.Module):
    """A module's rule as a forward, so that ``functional_call`` can put whole parameters in the place of shards."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self) -> dict[str, Tensor]:
        return neurons_of(self.module)


def _base(x: Tensor) -> Tensor:
    base = x._base if x._is_view() else x
    assert base is not None
    return base


def _origin(x: object, origins: dict[int, nn.Parameter]) -> nn.Parameter | None:
    """The parameter that x is, or is a view of; None if it was computed."""
    if not isinstance(x, Tensor):
        return None  # a rule gone wrong
    base = _base(x)
    return base if isinstance(base, nn.Parameter) else origins.get(id(base))


def _marked(p: Any, rank: int) -> Tensor:
    """A whole tensor of the shape of a sharded p whose entries are the numbers of the ranks that hold them."""
    held = torch.full_like(p.to_local(), rank, dtype=torch.float32, requires_grad=False)
    marked = type(p).from_local(
        held, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole(marked)


def _working(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)
