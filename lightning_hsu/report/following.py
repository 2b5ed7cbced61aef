"""Which layer of a model takes what another gives, and what lies between."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_hsu.report.activations import BY_FUNCTION, NONE, Activation, activation_of

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_MAX_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
_MEAN_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
_POOLS_WITHOUT_MODULE = {
    F.max_pool1d: True,
    F.max_pool2d: True,
    F.max_pool3d: True,
    F.adaptive_max_pool2d: True,
    F.adaptive_avg_pool1d: False,
    F.adaptive_avg_pool2d: False,
    F.adaptive_avg_pool3d: False,
}

USUAL_EPS = 1e-5
"""What batch norms add to a variance unless told otherwise; a file does not say it."""


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode.

    Args:
        mean: Running mean (n,).
        scale: What x - mean is multiplied by, (n,).
        bias: What is added after that, (n,).
        affine: How many parameters each neuron has here.
    """

    mean: Tensor
    scale: Tensor
    bias: Tensor
    affine: int


@dataclass(frozen=True)
class Stored:
    """A weight by its name.

    Args:
        name: Name of the tensor.
        transposed: Whether it is a matrix (inputs, outputs) instead of (outputs, inputs).
    """

    name: str
    transposed: bool = False

    def shape(self, shapes: Mapping[str, torch.Size]) -> torch.Size:
        """Its shape, the outputs first."""
        shape = shapes[self.name]
        return torch.Size(reversed(shape)) if self.transposed else shape

    def read(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """Its numbers, the outputs first, on the CPU."""
        weight = tensor(self.name).detach().cpu()
        return weight.mT if self.transposed else weight


@dataclass(frozen=True)
class Step:
    """A layer, the next one, and what lies between.

    Args:
        layer: Name of the layer.
        following: Name of the layer that takes what it gives.
        activation: What lies between.
        condition: What must hold for that, where it is read from names; else "".
        norm: Name of a batch norm right after the layer; None without one.
        keeps_sign: Whether all else between, such as a maximum, gives -y for -x.
        weight: How the layer's weight is stored; None is ``layer.weight`` with neurons as rows.
        following_weight: How the next one's is; None is likewise, so that a neuron has a column.
        bias: Name of the tensor with the layer's biases; None is ``layer.bias``.
    """

    layer: str
    following: str
    activation: Activation
    condition: str = ""
    norm: str | None = None
    keeps_sign: bool = True
    weight: Stored | None = None
    following_weight: Stored | None = None
    bias: str | None = None

    def stored(self) -> Stored:
        """How the layer's weight is stored."""
        return self.weight or Stored(f"{self.layer}.weight")

    def stored_following(self) -> Stored:
        """How the weight of the next layer is stored."""
        return self.following_weight or Stored(f"{self.following}.weight")

    def name_of_bias(self) -> str:
        """Name of the tensor with the layer's biases, which need not exist."""
        return self.bias or f"{self.layer}.bias"


@dataclass(frozen=True)
class Steps:
    """The pairs of layers of a network that are known to follow each other.

    Args:
        steps: The pairs.
        how: How they were found, in words.
        tensor: Returns a tensor of the network by its name.
        shapes: The shapes of all its tensors, by name.
        eps: What batch norms add to a variance, by their names.
        way_out: What to do where no following layer is known, in words; "" if there is nothing.
    """

    steps: list[Step]
    how: str
    tensor: Callable[[str], Tensor]
    shapes: Mapping[str, torch.Size]
    eps: Mapping[str, float]
    way_out: str = ""

    def bias(self, name: str, n: int) -> Tensor:
        """The bias of this name of a layer of n neurons, zeros without one."""
        if name not in self.shapes:
            return torch.zeros(n, dtype=torch.float64)
        return self.tensor(name).detach().double().flatten()

    def norm(self, name: str) -> Norm:
        """A batch norm by its name."""
        mean = self.tensor(f"{name}.running_mean").detach().double()
        variance = self.tensor(f"{name}.running_var").detach().double()
        scale = (variance + self.eps.get(name, USUAL_EPS)).rsqrt()
        affine = 0
        if f"{name}.weight" in self.shapes:
            scale = scale * self.tensor(f"{name}.weight").detach().double().to(scale.device)
            affine += 1
        bias = torch.zeros_like(mean)
        if f"{name}.bias" in self.shapes:
            bias = self.tensor(f"{name}.bias").detach().double().to(scale.device)
            affine += 1
        return Norm(mean, scale, bias, affine)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name."""
    return {name: x.shape for name, x in tensors.items()}


class _Between:
    """What lies between a layer and the next, collected step by step."""

    def __init__(self, layer: str, module: nn.Module) -> None:
        self.layer = layer
        self.is_conv = not isinstance(module, nn.Linear)
        self.outputs = _shape(module)[0]
        self.norm: str | None = None
        self.activation = NONE
        self.keeps_sign = True
        self.flat = not self.is_conv
        self.flattened = False
        self.touched = False  # by anything that is not the identity

    def take(self, name: str, module: nn.Module) -> bool:
        """Go through a module; return False if it ends the way."""
        kind = type(module)
        if _has_hooks(module):
            return False
        if kind in _NOTHING:
            return True
        if kind in _NORMS:
            return self._normalise(name, module)
        if kind is nn.Flatten:
            if module.start_dim != 1 or module.end_dim != -1:
                return False
            return self.flatten()
        if kind in _MAX_POOLS:
            return not getattr(module, "return_indices", False) and self.pool(is_max=True)
        if kind in _MEAN_POOLS:
            return getattr(module, "divisor_override", None) is None and self.pool(is_max=False)
        found = activation_of(module)
        return found is not None and self.activate(found)

    def _normalise(self, name: str, module: nn.Module) -> bool:
        if self.touched or self.norm or module.running_mean is None:
            return False
        if module.num_features != self.outputs:
            return False
        self.norm = name
        return True

    def activate(self, found: Activation) -> bool:
        """Go through an activation; one after another only if both are homogeneous."""
        before = self.activation
        self.touched = True
        if before is NONE:
            self.activation = found
            return True
        if not (before.homogeneous and found.homogeneous):
            return False
        slope = before.slope * found.slope
        self.activation = Activation(f"{before.name}, {found.name}", slope, homogeneous=True)
        return True

    def pool(self, is_max: bool) -> bool:
        """Go through a maximum or a mean over places."""
        if self.flat:
            return False
        self.touched = True
        if is_max:
            self.keeps_sign = False
        return True

    def flatten(self) -> bool:
        """Go through a flattening of all but the batch."""
        self.touched = True
        self.flattened = True
        self.flat = True
        return True

    def ends_at(self, name: str, module: nn.Module) -> Step | None:
        """The step to the next layer; None if it does not fit."""
        inputs = _shape(module)[1]
        if isinstance(module, nn.Linear):
            fits = self.flat and inputs == self.outputs
            if self.is_conv:
                fits = self.flattened and inputs % self.outputs == 0
        else:
            fits = self.is_conv and not self.flattened and inputs == self.outputs
        if not fits:
            return None
        return Step(self.layer, name, self.activation, norm=self.norm, keeps_sign=self.keeps_sign)


def _shape(module: nn.Module) -> torch.Size:
    """The shape of a layer's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module may do something else than its class does."""
    is_replaced = "forward" in vars(module)
    return is_replaced or bool(module._forward_hooks or module._forward_pre_hooks)


def _is_layer(module: nn.Module, shared: set[int]) -> bool:
    """Whether this is a plain layer whose weight nothing else has."""
    if type(module) not in _LAYERS or getattr(module, "groups", 1) != 1:
        return False
    return id(module.weight) not in shared and not _has_hooks(module)


def _shared(model: nn.Module) -> set[int]:
    """Weights that have two names."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            twice.add(id(parameter))
        seen.add(id(parameter))
    return twice


def steps_of_model(model: nn.Module) -> Steps:
    """The pairs of layers of a model: from its traced graph, else from its ``nn.Sequential``."""
    try:
        as_used = copy.deepcopy(model).eval()  # a copy, which may keep what it is called with
        graph = fx.Tracer().trace(as_used)
        steps = _traced(model, graph)
        how = "layers follow each other as the model was traced"
    except Exception:  # the model's own code may raise anything on a stand-in for its input
        steps = _in_sequentials(model)
        how = "the model cannot be traced: layers follow each other within nn.Sequential"
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    eps = {}
    for name, module in model.named_modules():
        if type(module) in _NORMS:
            eps[name] = float(module.eps)
    return Steps(steps, how, tensors.__getitem__, shapes_of(tensors), eps)


def _traced(model: nn.Module, graph: fx.Graph) -> list[Step]:
    modules = dict(model.named_modules())
    shared = _shared(model)
    calls: dict[nn.Module, int] = {}
    read = set()
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            calls[module] = calls.get(module, 0) + 1
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])
    steps = []
    for node in graph.nodes:
        if node.op != "call_module" or node.target in read:
            continue
        module = modules[node.target]
        if calls[module] == 1 and _is_layer(module, shared):
            step = _way_from(node, modules, calls, shared)
            if step is not None and step.following not in read:
                steps.append(step)
    return steps


def _way_from(
    start: fx.Node,
    modules: Mapping[str, nn.Module],
    calls: Mapping[nn.Module, int],
    shared: set[int],
) -> Step | None:
    """The way from a layer to the next one; None if it leads elsewhere."""
    between = _Between(str(start.target), modules[str(start.target)])
    node = start
    while True:
        users = [user for user in node.users if not _asks_batch(user, node)]
        if len(users) != 1:
            return None
        before = node
        node = users[0]
        if not node.all_input_nodes or node.args[:1] != (before,):
            return None
        if node.op == "call_module":
            module = modules[str(node.target)]
            if type(module) in _LAYERS:
                if calls[module] == 1 and _is_layer(module, shared):
                    return between.ends_at(str(node.target), module)
                return None
            if type(module) in _NORMS and calls[module] > 1:
                return None
            if not between.take(str(node.target), module):
                return None
        elif not _through(node, between):
            return None


def _asks_batch(user: fx.Node, node: fx.Node) -> bool:
    """Whether this only asks for the size of the batch."""
    if user.op == "call_method" and user.target == "size":
        return user.args == (node, 0)
    if user.op != "call_function" or user.target is not getattr or user.args[1] != "shape":
        return False
    return all(one.target is operator.getitem and one.args[1] == 0 for one in user.users)


def _through(node: fx.Node, between: _Between) -> bool:
    """Go through a function or a method; return False if it ends the way."""
    others = node.args[1:]
    found = BY_FUNCTION.get(node.target)
    if found is not None:
        return not others and between.activate(found)
    if node.target is F.leaky_relu:
        slope = others[0] if others else node.kwargs.get("negative_slope", 0.01)
        if not isinstance(slope, float):
            return False
        largest = max(1.0, abs(slope))
        return between.activate(Activation("leaky ReLU", largest, homogeneous=True))
    if node.target is F.dropout:
        return True
    if node.target in _POOLS_WITHOUT_MODULE and not node.kwargs.get("return_indices"):
        return between.pool(_POOLS_WITHOUT_MODULE[node.target])
    if node.target in (torch.flatten, "flatten"):
        start = others[0] if others else node.kwargs.get("start_dim")
        if start != 1 or len(others) > 1 or "end_dim" in node.kwargs:
            return False
        return between.flatten()
    if node.target in ("view", "reshape"):
        return _keeps_batch(others) and between.flatten()
    return False


def _keeps_batch(sizes: Sequence[Any]) -> bool:
    """Whether these are the sizes (batch, -1), as they come from ``x.view(x.size(0), -1)``."""
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node):
        return False
    size = sizes[0]
    if size.op == "call_method" and size.target == "size":
        return size.args[1:] == (0,)
    if size.op != "call_function" or size.target is not operator.getitem or size.args[1] != 0:
        return False
    shape = size.args[0]
    return isinstance(shape, fx.Node) and shape.target in ("size", getattr)


def _in_sequentials(model: nn.Module) -> list[Step]:
    shared = _shared(model)
    steps = []
    for prefix, container in model.named_modules():
        if type(container) is not nn.Sequential or _has_hooks(container):
            continue
        between: _Between | None = None
        for key, module in container.named_children():
            name = f"{prefix}.{key}".lstrip(".")
            if _is_layer(module, shared):
                step = between.ends_at(name, module) if between else None
                if step is not None:
                    steps.append(step)
                between = _Between(name, module)
            elif between is not None and not between.take(name, module):
                between = None
    return steps
