"""Which layer of a model takes what another gives, and what lies between."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_hsu._monitor.render import shorten
from lightning_hsu.report.activations import BY_FUNCTION, NONE, Activation, activation_of
from lightning_hsu.report.steps import Step, Steps, shapes_of

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
_ADDING = (operator.add, operator.iadd, torch.add, "add", "add_")
_JOINING = (torch.cat, torch.concat, torch.stack)
_LONGEST_ERROR = 100  # characters of the error of a trace


class _Between:
    """What lies between a layer and the next, collected step by step.

    Each method goes through something. It returns why that ends the way; "" if it does not.
    """

    def __init__(self, layer: str, module: nn.Module) -> None:
        self.layer = layer
        self.is_conv = not isinstance(module, nn.Linear)
        self.outputs = _shape(module)[0]
        self.norm: str | None = None
        self.prelu: str | None = None
        self.activation = NONE
        self.keeps_sign = True
        self.flat = not self.is_conv
        self.flattened = False
        self.touched = False  # by anything that is not the identity

    def take(self, name: str, module: nn.Module, shared: set[int]) -> str:
        """Go through a module."""
        kind = type(module)
        ends = f"{kind.__name__} lies between"
        if _has_hooks(module):
            return f"{kind.__name__} with hooks lies between"
        if kind in _NOTHING:
            return ""
        if kind in _NORMS:
            return self._normalise(name, module)
        if kind is nn.Flatten:
            whole = module.start_dim == 1 and module.end_dim == -1
            return self.flatten() if whole else "a partial Flatten lies between"
        if kind in _MAX_POOLS:
            return ends if getattr(module, "return_indices", False) else self.pool(is_max=True)
        if kind in _MEAN_POOLS:
            plain = getattr(module, "divisor_override", None) is None
            return self.pool(is_max=False) if plain else ends
        if type(module) is nn.PReLU and module.weight.numel() > 1:
            return self.scale_negative(f"{name}.weight", module.weight, shared)
        found = activation_of(module)
        return ends if found is None else self.activate(found)

    def _normalise(self, name: str, module: nn.Module) -> str:
        kind = type(module).__name__
        if module.running_mean is None:
            return f"{kind} without running averages lies between"
        if self.touched or self.norm:
            return f"{kind} lies between, not right after it"
        if module.num_features != self.outputs:
            return f"{kind} of another size lies between"
        self.norm = name
        return ""

    def activate(self, found: Activation) -> str:
        """Go through an activation; one after another only if both are homogeneous."""
        before = self.activation
        self.touched = True
        if before is NONE:
            self.activation = found
            return ""
        if self.prelu or not (before.homogeneous and found.homogeneous):
            return f"two activations lie between: {before.name} and {found.name}"
        slope = before.slope * found.slope
        self.activation = Activation(f"{before.name}, {found.name}", slope, homogeneous=True)
        return ""

    def scale_negative(self, name: str, slopes: Tensor, shared: set[int]) -> str:
        """Go through a PReLU with a slope for each neuron."""
        if id(slopes) in shared:
            return "a PReLU lies between whose slopes something else has, too"
        if self.flattened or slopes.shape != (self.outputs,):
            return "a PReLU whose slopes are not one for each neuron lies between"
        if self.activation is not NONE:
            return f"two activations lie between: {self.activation.name} and PReLU"
        steepest = max(1.0, float(slopes.detach().abs().max()))
        self.prelu = name
        return self.activate(Activation("PReLU", steepest, homogeneous=True))

    def pool(self, is_max: bool) -> str:
        """Go through a maximum or a mean over places."""
        if self.flat:
            return "a pooling after no convolution lies between"
        self.touched = True
        if is_max:
            self.keeps_sign = False
        return ""

    def flatten(self) -> str:
        """Go through a flattening of all but the batch."""
        self.touched = True
        self.flattened = True
        self.flat = True
        return ""

    def ends_at(self, name: str, module: nn.Module) -> Step | str:
        """The step to the next layer; why there is none if it does not fit."""
        inputs = _shape(module)[1]
        if isinstance(module, nn.Linear):
            fits = self.flat and inputs == self.outputs
            if self.is_conv:
                fits = self.flattened and inputs % self.outputs == 0
        else:
            fits = self.is_conv and not self.flattened and inputs == self.outputs
        if not fits:
            return f"its neurons are not the inputs of the next layer, {name}"
        return Step(
            self.layer,
            name,
            self.activation,
            norm=self.norm,
            keeps_sign=self.keeps_sign,
            prelu=self.prelu,
        )


def _shape(module: nn.Module) -> torch.Size:
    """The shape of a layer's weight."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module may do something else than its class does."""
    is_replaced = "forward" in vars(module)
    return is_replaced or bool(module._forward_hooks or module._forward_pre_hooks)


def _unfit(module: nn.Module, shared: set[int]) -> str:
    """Why this is no plain layer whose weight nothing else has; "" if it is one."""
    if type(module) not in _LAYERS:
        return f"only Linear layers and convolutions are followed, not {type(module).__name__}"
    if getattr(module, "groups", 1) != 1:
        return "it has groups"
    if id(module.weight) in shared:
        return "something else has its weight, too"
    return "it has hooks or a forward of its own" if _has_hooks(module) else ""


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
        steps, reasons = _Traced(model, fx.Tracer().trace(as_used)).find()
        how = "layers follow each other as the model was traced"
        otherwise = (
            "its weight is used by itself, which is not followed in a model; "
            "merges(model.state_dict()) goes by names"
        )
    except Exception as error:  # the model's own code may raise anything on a stand-in
        steps, reasons = _in_sequentials(model)
        how = "the model cannot be traced: layers follow each other within nn.Sequential"
        otherwise = f"the forward pass cannot be traced: {_first_line(error)}"
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    eps = {}
    for name, module in model.named_modules():
        if type(module) in _NORMS:
            eps[name] = float(module.eps)
    return Steps(
        steps,
        how,
        tensors.__getitem__,
        shapes_of(tensors),
        eps,
        reasons=reasons,
        otherwise=otherwise,
    )


def _first_line(error: Exception) -> str:
    """The first line of an error, or its type."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0], _LONGEST_ERROR) if lines else type(error).__name__


class _Traced:
    """A traced model, and how often what is called and read in it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        self.parameters = dict(model.named_parameters())
        self.shared = _shared(model)
        self.calls: dict[nn.Module, int] = {}
        self.reads: dict[str, int] = {}
        self.read_of = set()
        for node in graph.nodes:
            target = str(node.target)
            if node.op == "call_module":
                module = self.modules[target]
                self.calls[module] = self.calls.get(module, 0) + 1
            elif node.op == "get_attr":
                self.reads[target] = self.reads.get(target, 0) + 1
                self.read_of.add(target.rpartition(".")[0])

    def find(self) -> tuple[list[Step], dict[str, str]]:
        """The pairs of layers, and why other layers have no next one, by name."""
        steps = []
        reasons = self._not_called()
        for node in self.graph.nodes:
            name = str(node.target)
            if node.op != "call_module" or type(self.modules[name]) not in _LAYERS:
                continue
            found: Step | str = self._unfit(name) or self._way_from(node)
            if isinstance(found, Step):
                steps.append(found)
            else:
                reasons[name] = found
        return steps, reasons

    def _not_called(self) -> dict[str, str]:
        """Why modules are not called by themselves."""
        reasons = {}
        for name, module in self.modules.items():
            reason = ""
            if module not in self.calls and type(module) in _LAYERS:
                reason = "the traced forward pass does not call it"
                above = name
                while above:
                    above = above.rpartition(".")[0]
                    whole = self.modules[above]
                    if whole in self.calls:
                        kind = type(whole).__name__
                        reason = f"it is a part of {above}, a {kind}, which is not traced"
            elif module in self.calls and type(module) not in _LAYERS:
                reason = _unfit(module, self.shared)
            if reason:
                reasons[name] = reason
        return reasons

    def _unfit(self, name: str) -> str:
        """Why a layer is not merged with the one before or after it; "" if it may be."""
        module = self.modules[name]
        if self.calls[module] > 1:
            return "it is called several times"
        if name in self.read_of:
            return "its weight is read elsewhere, too"
        return _unfit(module, self.shared)

    def _way_from(self, start: fx.Node) -> Step | str:
        """The way from a layer to the next one; why there is none if it leads elsewhere."""
        between = _Between(str(start.target), self.modules[str(start.target)])
        node = start
        while True:
            users = [user for user in node.users if not _asks_batch(user, node)]
            reason = _not_alone(users)
            if reason:
                return reason
            before = node
            node = users[0]
            name = str(node.target)
            if node.op == "call_module" and node.args[:1] == (before,):
                module = self.modules[name]
                if type(module) in _LAYERS:
                    reason = self._unfit(name)
                    if reason:
                        return f"the next layer, {name}, cannot be changed: {reason}"
                    return between.ends_at(name, module)
                reason = between.take(name, module, self.shared)
                if self._needed_elsewhere(name):
                    reason = f"a {type(module).__name__} that is used several times lies between"
            else:
                reason = f"{_called(node, self.modules)} lies between"
                if node.args[:1] == (before,):
                    reason = self._through(node, between)
            if reason:
                return reason

    def _needed_elsewhere(self, name: str) -> bool:
        """Whether numbers of a module that belong to neurons are used several times."""
        module = self.modules[name]
        if not _has_numbers(module):
            return False
        return self.calls[module] > 1 or name in self.read_of

    def _through(self, node: fx.Node, between: _Between) -> str:
        """Go through a function or a method; return why it ends the way, or ""."""
        if node.target in (torch.prelu, "prelu"):
            slopes = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            if isinstance(slopes, fx.Node) and slopes.op == "get_attr":
                name = str(slopes.target)
                tensor = self.parameters.get(name)
                owner = self.modules.get(name.rpartition(".")[0])
                alone = self.reads[name] == 1 and len(slopes.users) == 1 and owner not in self.calls
                if tensor is not None and alone:
                    return between.scale_negative(name, tensor, self.shared)
            return "a PReLU whose slopes are not its own lies between"
        if _through(node, between):
            return ""
        return f"{_called(node, self.modules)} lies between"


def _has_numbers(module: nn.Module) -> bool:
    """Whether a module between has numbers that belong to neurons."""
    if type(module) is nn.PReLU:
        return module.weight.numel() > 1
    return type(module) in _NORMS


def _not_alone(users: Sequence[fx.Node]) -> str:
    """Why what takes some outputs is not one layer or function; "" if it is."""
    if not users:
        return "nothing takes its outputs"
    for user in users:
        if user.op == "output":
            return "its outputs are the network's own"
        if user.target in _ADDING and len(user.all_input_nodes) > 1:
            return "its outputs are added to others"
        if user.target in _JOINING:
            return "its outputs are joined with others"
    return "several layers take its outputs" if len(users) > 1 else ""


def _called(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """The name of a module's class, a function or a method."""
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    return str(getattr(node.target, "__name__", node.target))


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
        return not others and not between.activate(found)
    if node.target is F.leaky_relu:
        slope = others[0] if others else node.kwargs.get("negative_slope", 0.01)
        if not isinstance(slope, float):
            return False
        largest = max(1.0, abs(slope))
        return not between.activate(Activation("leaky ReLU", largest, homogeneous=True))
    if node.target is F.dropout:  # without training=False it drops in eval mode, too
        return (others[1] if len(others) > 1 else node.kwargs.get("training", True)) is False
    if node.target in _POOLS_WITHOUT_MODULE and not node.kwargs.get("return_indices"):
        return not between.pool(_POOLS_WITHOUT_MODULE[node.target])
    if node.target in (torch.flatten, "flatten"):
        start = others[0] if others else node.kwargs.get("start_dim")
        if start != 1 or len(others) > 1 or "end_dim" in node.kwargs:
            return False
        return not between.flatten()
    if node.target in ("view", "reshape"):
        return _keeps_batch(others) and not between.flatten()
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


def _in_sequentials(model: nn.Module) -> tuple[list[Step], dict[str, str]]:
    """The pairs of layers within ``nn.Sequential``, and what ends the way from other layers."""
    shared = _shared(model)
    steps = []
    reasons = {}
    places: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        places[module] = places.get(module, 0) + 1
    for name, module in model.named_modules():
        reason = _unfit(module, shared)
        if reason and (type(module) in _LAYERS or not list(module.children())):
            reasons[name] = reason
    for prefix, container in model.named_modules():
        if type(container) is not nn.Sequential or _has_hooks(container):
            continue
        between: _Between | None = None
        for key, module in container._modules.items():  # each time that it is called
            name = f"{prefix}.{key}".lstrip(".")
            if module is None:
                continue
            if not _unfit(module, shared):
                found: Step | str = between.ends_at(name, module) if between else ""
                if isinstance(found, Step):
                    steps.append(found)
                elif between and found:
                    reasons[between.layer] = found
                between = _Between(name, module)
            elif between is not None:
                reason = between.take(name, module, shared)
                if type(module) in _LAYERS:
                    unfit = _unfit(module, shared)
                    reason = f"the next layer, {name}, cannot be changed: {unfit}"
                elif _has_numbers(module) and places[module] > 1:
                    reason = f"a {type(module).__name__} that is used several times lies between"
                if reason:
                    reasons[between.layer] = reason
                    between = None
    return steps, reasons
