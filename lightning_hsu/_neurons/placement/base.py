"""The placement interface, and the simplest placement: every weight is whole on this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_hsu._neurons.rules import Rule, neurons_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Gathered = dict[int, Tensor]
"""Whole parameters by the id of the sharded one, so that one step gathers each only once."""


@dataclass(frozen=True, eq=False)
class NeuronView:
    """One set of neurons as it is now.

    Args:
        x: The effective neurons, (n, d) or (groups, n, d), whole on every rank. They are
            differentiable where gradients are recorded.
        parameter: The parameter of which x is a view; None if x is computed.
    """

    x: Tensor
    parameter: nn.Parameter | None


class PenalisedLayer(NamedTuple):
    """A layer whose penalty is about to be added to a loss.

    Args:
        name: Its name in the model.
        shape: Shape of its neurons (groups, n, d).
        parameters: The parameters that its neurons depend on.
    """

    name: str
    shape: tuple[int, int, int]
    parameters: Sequence[nn.Parameter]


class Message(NamedTuple):
    """What one rank has for all.

    Args:
        owner: The number of that rank.
        entries: What it has, one-dimensional; the other ranks' entries are overwritten.
    """

    owner: int
    entries: Tensor


class Placement:
    """How the weights of a model are placed: here, whole on this process.

    A strategy is one file: subclass this class, override what differs, and add the class to the
    registry in ``placement/__init__.py``.

    Attributes:
        strategies: Names of the Lightning strategies that place weights this way.
        loss_refusal: Why ``apply="loss"`` cannot be right, with ``{strategy}`` for the strategy's
            name; None if it can.
        is_alone: Whether no other rank trains the same weights.
        keeps_whole: Whether parameters can be read without :meth:`whole_parameters`.
    """

    strategies: ClassVar[frozenset[str]] = frozenset({"SingleDeviceStrategy"})
    loss_refusal: ClassVar[str | None] = None
    is_alone: ClassVar[bool] = True
    keeps_whole: ClassVar[bool] = True

    @classmethod
    def recognise(
        cls,
        model: nn.Module,
        wrapped: nn.Module,
        group: ProcessGroup | None,
        share_work: bool,
    ) -> Placement | None:
        """Return the placement of this model if it is of this kind, else None.

        This base class serves every model that no other kind recognises.

        Args:
            model: The model without the wrappers of Fabric and DDP.
            wrapped: The same model in all its wrappers.
            group: The ranks that train the same weights, if they are known.
            share_work: Whether ranks with the same weights may compute layers for one another.
        """
        return None

    # How to read weights.

    @contextmanager
    def whole_parameters(self, *, with_grads: bool) -> Iterator[None]:
        """Make every parameter, and its gradient if asked for, whole while neurons are read.

        Changes are written back if gradients were asked for.
        """
        yield

    def read(
        self, module: nn.Module, rule: Rule, gathered: Gathered | None = None
    ) -> dict[str, NeuronView]:
        """Read the neurons of a module, by key. A collective call if its parameters are sharded.

        Args:
            module: The module.
            rule: How its neurons are read.
            gathered: Whole parameters that this step has gathered already; more are added.
        """
        views = {}
        for key, x in neurons_by(rule, module).items():
            views[key] = NeuronView(x, viewed_parameter(x, {}))
        return views

    def held_rows(self, module: nn.Module, rule: Rule, key: str) -> Tensor | None:
        """Mask (n) or (groups, n) of the neurons of which this rank holds a part.

        None if this rank needs the gradient of every neuron.
        """
        return None

    def parameters_behind(self, module: nn.Module, rule: Rule, key: str) -> list[nn.Parameter]:
        """Parameters of a module, trained or frozen, on which its neurons depend.

        A collective call if its parameters are sharded.
        """
        parameters = []
        leaves = {}
        with torch.enable_grad():
            for name, p in module.named_parameters():
                if p.is_floating_point():
                    parameters.append(p)
                    leaves[name] = self.whole(p.detach()).requires_grad_()
            x = neurons_with(module, rule, leaves)[key]
            if not x.requires_grad:
                return []
            grads = torch.autograd.grad(
                x, list(leaves.values()), torch.ones_like(x), allow_unused=True
            )
        behind = []
        for p, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                behind.append(p)
        return behind

    def take_back_forward_weights(
        self, model: nn.Module, held: Sequence[tuple[nn.Module, nn.Parameter]]
    ) -> None:
        """Take back the weights that the forward pass left in a lower precision.

        Args:
            model: The model.
            held: Modules, each with a parameter that it holds at other times.
        """

    def take_back_weights(self, model: nn.Module) -> None:
        """Take back all weights that a forward pass has left whole."""

    def is_replaced(self, p: nn.Parameter, now: Tensor | None) -> bool:
        """Whether another parameter has taken the place of one for good.

        Args:
            p: The parameter.
            now: What is registered in its place, or nothing.
        """
        # torch.func puts plain tensors in the place of parameters for one call.
        return now is not p and (now is None or isinstance(now, nn.Parameter))

    def stand_ins(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """Parameters by the ids of the tensors that stand for them in autograd's graph."""
        return {}

    def agree(self, names: list[str]) -> list[str]:
        """The names that rank 0 has found. A collective call if ranks train together."""
        return names

    def check_loss(self, loss: Tensor, layers: Sequence[PenalisedLayer]) -> None:
        """Refuse a loss to which the penalty of some layer cannot be added.

        Raises:
            NotImplementedError: if the loss is a DTensor.
            RuntimeError: if a gradient of the layer is closed already.
        """
        if hasattr(loss, "full_tensor"):
            raise NotImplementedError(
                "the loss is a DTensor: add the penalty to its gradients, or return "
                "loss.full_tensor()"
            )

    # Tensors that may be sharded.

    def is_sharded(self, x: Tensor) -> bool:
        """Whether this rank holds only a part of a tensor, or a copy that it shares."""
        return False

    def whole(self, x: Tensor) -> Tensor:
        """All of a tensor. A collective call if it is sharded."""
        return x

    def local(self, x: Tensor) -> Tensor:
        """The part of a tensor that this rank holds."""
        return x

    def norm(self, parts: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of several tensors together. A collective call if some are sharded."""
        norms = []
        for part in parts:
            dtype = torch.promote_types(part.dtype, torch.float32)
            norms.append(self.whole(torch.linalg.vector_norm(part, dtype=dtype)))
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def any_holder(self, mask: Tensor, p: Tensor) -> Tensor:
        """Combine a mask with "or" over the ranks that hold parts of p.

        A collective call if p is sharded.
        """
        return mask

    def largest(self, number: Tensor, p: Tensor) -> Tensor:
        """The largest of each number (of any shape) of the ranks that hold parts of p.

        A collective call if p is sharded.
        """
        return number

    def total(self, numbers: Tensor, p: Tensor) -> Tensor:
        """The sum of each number (of any shape) over the ranks that hold parts of p.

        A collective call if p is sharded.
        """
        return numbers

    # Work that ranks with the same weights share.

    @property
    def shares_work(self) -> bool:
        """Whether one rank computes a layer for all, now: the same on all ranks."""
        return False

    @property
    def is_uneven(self) -> bool:
        """Whether ranks that train the same weights may take unequal numbers of steps."""
        return False

    @property
    def rank(self) -> int:
        """Number of this process among those that share the work."""
        return 0

    @property
    def size(self) -> int:
        """How many processes share the work."""
        return 1

    def send(
        self, messages: Sequence[Message], *, beside: bool = False
    ) -> list[Callable[[], object]]:
        """Begin to send messages from their owners to all ranks; a collective call.

        Args:
            messages: The messages, the same on all ranks.
            beside: Whether they may be under way while the task's gradients are reduced.

        Returns:
            Functions that wait for them.
        """
        return []

    def release(self) -> None:
        """Give back what was made for messages; wait for all of them before."""


def names_of_first(names: list[str], group: ProcessGroup | None) -> list[str]:
    """The names that the first rank of a group has. A collective call."""
    first = 0
    if group is not None:
        first = torch.distributed.get_global_rank(group, 0)
    agreed = [names]
    torch.distributed.broadcast_object_list(agreed, src=first, group=group)
    return agreed[0]


def neurons_with(module: nn.Module, rule: Rule, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's neurons, by key, with tensors in place of the parameters of these names."""
    replaced = {}
    for name, x in given.items():
        replaced[f"module.{name}"] = x
    neurons: dict[str, Tensor] = functional_call(_Rule(module, rule), replaced, ())
    return neurons


class _Rule(nn.Module):
    """A module's rule as a forward pass, which is what ``functional_call`` takes."""

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        super().__init__()
        self.module = module
        self.rule = rule

    def forward(self) -> dict[str, Tensor]:
        return neurons_by(self.rule, self.module)


def viewed_parameter(x: object, origins: Mapping[int, nn.Parameter]) -> nn.Parameter | None:
    """The parameter that x is, or is a view of; None if x is computed.

    Args:
        x: What a rule returned; a user's own rule may return something other than a tensor.
        origins: Sharded parameters by the id of the whole tensor that stands for each.
    """
    if not isinstance(x, Tensor):
        return None
    base = view_base(x)
    if isinstance(base, nn.Parameter):
        return base
    return origins.get(id(base))


def view_base(x: Tensor) -> Tensor:
    """The tensor that x is a view of; x itself if it is none."""
    if not x._is_view():
        return x
    base = x._base
    assert base is not None
    return base
