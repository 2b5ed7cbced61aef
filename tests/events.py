"""Events under the feet of a training: what a user's own code may do to the model and its optimizers while a fit runs.

``EVENTS`` is the table. Each event is applied with dice of its own, so that two runs that stand at the same place do the same,
and tells in words what it did; "" if there was nothing to do it to.
"""

import copy
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, weight_norm
from torch.optim import SGD, Adam, AdamW, RMSprop

from tests.models import network


def as_weight(x, layer):
    """An input in the dtype of a layer, since events convert single layers."""
    parameters = list(layer.parameters())
    return x.to(parameters[0].dtype) if parameters else x


class Pictures(nn.Sequential):
    """A convolution, a grouped one, a Linear and a head, as ``tests.models.network``."""

    head_name = "net.7"

    def __init__(self):
        super().__init__(*network())

    def forward(self, x):
        for layer in self:
            x = layer(as_weight(x, layer))
        return x

    def last_name(self):
        """Name of the layer that acts last."""
        return "net.8" if len(self) == 9 else "net.7"

    def chain(self):
        """The layers whose widths fit each other, in the order in which they act."""
        return [self[0], self[2], self[5], self[7]]


class Blocks(nn.Module):
    """Blocks of one shape between a stem and a head; ``extra``, which a user may add, acts before the head."""

    head_name = "net.head"

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(36, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.chain()[:-1]:
            x = torch.tanh(layer(as_weight(x, layer)))
        return self.head(as_weight(x, self.head))

    def last_name(self):
        """Name of the layer that acts last."""
        return "net.head"

    def chain(self):
        """The layers whose widths fit each other, in the order in which they act."""
        extra = [self.extra] if hasattr(self, "extra") else []
        return [self.stem, *self.blocks, *extra, self.head]


NETS = {"pictures": Pictures, "blocks": Blocks}


@dataclass(frozen=True)
class Slot:
    """A place in the model that holds a layer."""

    name: str
    parent: nn.Module
    key: str
    layer: nn.Module

    @property
    def is_plain(self):
        """Whether the weight is a parameter itself, and nothing computes it."""
        return "weight" in self.layer._parameters


class Scene:
    """What an event may touch.

    Args:
        module: The LightningModule.
        trainer: The Trainer whose optimizers these are; None in the plain loop.
        optimizers: Those of the plain loop.
    """

    def __init__(self, module, trainer=None, optimizers=()):
        self.module = module
        self.trainer = trainer
        self._optimizers = list(optimizers)

    @property
    def net(self):
        return self.module.net

    @property
    def optimizers(self):
        return self._optimizers if self.trainer is None else self.trainer.strategy.optimizers

    @optimizers.setter
    def optimizers(self, optimizers):
        if self.trainer is None:
            self._optimizers = optimizers
        else:
            self.trainer.strategy.optimizers = optimizers

    def slots(self):
        """All layers, each once."""
        found: dict[int, Slot] = {}
        for prefix, parent in self.module.named_modules():
            for key, child in parent.named_children():
                if isinstance(child, nn.Linear | nn.Conv2d):
                    found.setdefault(id(child), Slot(f"{prefix}.{key}", parent, key, child))
        return list(found.values())

    def plain_slots(self):
        """The layers whose weights are parameters of theirs alone."""
        holders: dict[int, int] = {}
        for layer in self.module.modules():
            for p in layer._parameters.values():
                holders[id(p)] = holders.get(id(p), 0) + 1
        return [one for one in self.slots() if one.is_plain and holders[id(one.layer.weight)] == 1]

    def missing(self):
        """The parameters that no optimizer has."""
        owned = set()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                owned.update(map(id, group["params"]))
        return [p for p in self.module.parameters() if id(p) not in owned]


class Dice(random.Random):
    """Dice that also make tensors."""

    def normal(self, *shape, like):
        """Normal numbers in the dtype of a parameter, of about its size."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        scale = float(like.detach().double().square().mean().sqrt()) or 0.3
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (numbers * scale).to(like.dtype)


def replaced_in_groups(scene, pairs):
    """Put new parameters where the optimizers have the old ones, without their state."""
    new = {id(old): fresh for old, fresh in pairs}
    for optimizer in scene.optimizers:
        for group in optimizer.param_groups:
            for old in group["params"]:
                if id(old) in new:
                    optimizer.state.pop(old, None)
            group["params"] = [new.get(id(p), p) for p in group["params"]]


def tell(scene, dice, pairs=()):
    """Tell the optimizers of new parameters, one way or another, or not at all."""
    how = dice.choice(["in its place", "a group", "a group", "a group of its own rate", "untold"])
    if how == "untold":
        return "untold"
    if how == "in its place" and pairs:
        replaced_in_groups(scene, pairs)
        return "told, in the old one's place"
    new = scene.missing()
    if not new:
        return "nothing to tell"
    group = {"params": new}
    if how == "a group of its own rate":
        group["lr"] = dice.choice([0.02, 0.05])
    dice.choice(scene.optimizers).add_param_group(group)
    return "told, " + how


def described(layer):
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    return f"Conv2d({layer.in_channels}, {layer.out_channels}, groups={layer.groups})"


def fresh_like(layer, dice, *, wide=None, narrow=None):
    """A fresh layer of the same kind and dtype, with ``wide`` outputs and ``narrow`` inputs."""
    like = next(layer.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dice.randrange(2**31))
        if isinstance(layer, nn.Linear):
            inputs, outputs = narrow or layer.in_features, wide or layer.out_features
            return nn.Linear(inputs, outputs, dtype=like.dtype)
        inputs, outputs = narrow or layer.in_channels, wide or layer.out_channels
        return nn.Conv2d(inputs, outputs, 3, groups=layer.groups, dtype=like.dtype)


def pairs_of(old, new):
    """Parameters of the same names in two layers."""
    others = dict(new.named_parameters())
    return [(p, others[name]) for name, p in old.named_parameters() if name in others]


# Parameters and modules that are replaced


def new_parameter(scene, dice):
    slot = dice.choice(scene.plain_slots() or [None])
    if slot is None:
        return ""
    old = slot.layer.weight
    slot.layer.weight = nn.Parameter(dice.normal(*old.shape, like=old))
    how = tell(scene, dice, [(old, slot.layer.weight)])
    return f"{slot.name}.weight is a new Parameter, {how}"


def assigned_state(scene, dice):
    state = {}
    for name, value in scene.net.state_dict().items():
        is_mask = name.endswith("_mask")
        state[name] = (
            value.clone() if is_mask else value + 0.3 * dice.normal(*value.shape, like=value)
        )
    before = dict(scene.net.named_parameters())
    scene.net.load_state_dict(state, assign=True)
    after = dict(scene.net.named_parameters())
    how = tell(scene, dice, [(before[name], after[name]) for name in before])
    return f"load_state_dict(assign=True), {how}"


def fresh_module(scene, dice):
    slot = dice.choice(scene.slots())
    new = fresh_like(slot.layer, dice)
    setattr(slot.parent, slot.key, new)
    how = tell(scene, dice, pairs_of(slot.layer, new))
    return f"{slot.name} is a fresh {described(new)}, {how}"


def another_width(scene, dice):
    """A layer and the one that takes its output."""
    chain = scene.net.chain()
    i = dice.randrange(len(chain) - 1)
    slots = {id(one.layer): one for one in scene.slots()}
    first, second = slots[id(chain[i])], slots[id(chain[i + 1])]
    if first is second or chain.count(chain[i]) + chain.count(chain[i + 1]) > 2:
        return ""  # one module in several places
    is_linear = isinstance(first.layer, nn.Linear)
    width = first.layer.out_features if is_linear else first.layer.out_channels
    wide = width + dice.choice([-2, 2])
    narrow = wide * (4 if isinstance(second.layer, nn.Linear) and not is_linear else 1)
    new = fresh_like(first.layer, dice, wide=wide), fresh_like(second.layer, dice, narrow=narrow)
    pairs = pairs_of(first.layer, new[0]) + pairs_of(second.layer, new[1])
    setattr(first.parent, first.key, new[0])
    setattr(second.parent, second.key, new[1])
    how = tell(scene, dice, pairs)
    return f"{first.name} is a fresh {described(new[0])}, {second.name} {described(new[1])}, {how}"


def swapped(scene, dice):
    first, second = alike(scene, dice, scene.slots())
    if first is None:
        return ""
    setattr(first.parent, first.key, second.layer)
    setattr(second.parent, second.key, first.layer)
    return f"{first.name} and {second.name} change places"


def alike(scene, dice, slots):
    """Two layers of one shape, of which the first comes first in the model; (None, None) if there are none."""
    pairs = []
    for i, first in enumerate(slots):
        for second in slots[i + 1 :]:
            if described(first.layer) == described(second.layer):
                pairs.append((first, second))
    return dice.choice(pairs) if pairs else (None, None)


def copied_net(scene, dice):
    if any(not one.is_plain for one in scene.slots()):
        return ""  # torch does not copy what a hook has computed
    before = scene.net
    scene.module.net = copy.deepcopy(before)
    how = tell(scene, dice, pairs_of(before, scene.net))
    return f"module.net is a copy, {how}"


# Layers that come and go


def added_layer(scene, dice):
    net = scene.net
    if not isinstance(net, Blocks):
        return ""
    width = net.chain()[-2].out_features
    new = fresh_like(net.chain()[-2], dice, wide=width, narrow=width)
    if hasattr(net, "extra"):
        return ""  # blocks act before it
    if dice.random() < 0.5:
        net.blocks.append(new)
        return f"net.blocks.append({described(new)}), {tell(scene, dice)}"
    net.extra = new
    return f"net.extra = {described(new)}, {tell(scene, dice)}"


def removed_layer(scene, dice):
    """Its parameters stay in their optimizer."""
    net = scene.net
    if not isinstance(net, Blocks):
        return ""
    if hasattr(net, "extra"):
        del net.extra
        return "net.extra is removed"
    square = [i for i, one in enumerate(net.blocks) if one.in_features == one.out_features]
    if len(net.blocks) < 3 or not square:
        return ""
    i = dice.choice(square)
    del net.blocks[i]
    return f"net.blocks.{i} is removed"


def new_head(scene, dice):
    """A layer behind the head, which is the head then; and away again."""
    net = scene.net
    if not isinstance(net, Pictures):
        return ""
    if len(net) == 9:
        del net[8]
        return "net.8, which acted last, is removed"
    new = fresh_like(net[7], dice, wide=3, narrow=3)
    net.append(new)
    return f"net.append({described(new)}) behind the head, {tell(scene, dice)}"


# Weights in several places


def tied(scene, dice):
    first, second = alike(scene, dice, scene.plain_slots())
    if first is None:
        return ""
    second.layer.weight = first.layer.weight
    return f"{second.name}.weight is that of {first.name}"


def untied(scene, dice):
    owners: dict[int, Slot] = {}
    for slot in scene.slots():
        if not slot.is_plain:
            continue
        first = owners.setdefault(id(slot.layer.weight), slot)
        if first is not slot:
            slot.layer.weight = nn.Parameter(slot.layer.weight.detach().clone())
            return f"{slot.name}.weight is its own again, {tell(scene, dice)}"
    return ""


def shared_module(scene, dice):
    first, second = alike(scene, dice, scene.slots())
    if first is None:
        return ""
    setattr(second.parent, second.key, first.layer)
    return f"{second.name} is the module {first.name}"


# Weights that are computed


class Scaling(nn.Module):
    """A weight is the parameter, each column with a factor of its own."""

    def forward(self, weight):
        factors = torch.linspace(0.5, 1.5, weight[0].numel(), dtype=weight.dtype)
        return weight * factors.view(weight.shape[1:])


def parametrized(scene, dice):
    slot = dice.choice(scene.plain_slots() or [None])
    if slot is None:
        return ""
    if dice.random() < 0.5:
        parametrize.register_parametrization(slot.layer, "weight", Scaling())
        return f"{slot.name}.weight is scaled by a parametrization"
    parametrizations.weight_norm(slot.layer)
    return f"{slot.name} gets parametrizations.weight_norm, {tell(scene, dice)}"


def unparametrized(scene, dice):
    found = [one for one in scene.slots() if parametrize.is_parametrized(one.layer)]
    if not found:
        return ""
    slot = dice.choice(found)
    parametrize.remove_parametrizations(slot.layer, "weight")
    return f"{slot.name} loses its parametrization, {tell(scene, dice)}"


def pruned(scene, dice):
    slot = dice.choice(scene.plain_slots() or [None])
    if slot is None:
        return ""
    weight = slot.layer.weight
    mask = (dice.normal(*weight.shape, like=torch.ones((), dtype=torch.float32)) > -0.5).to(
        weight.dtype
    )
    mask.view(len(mask), -1)[:, 0] = 1.0  # no neuron is lost
    prune.custom_from_mask(slot.layer, "weight", mask)
    return f"{slot.name} is pruned"


def unpruned(scene, dice):
    found = [one for one in scene.slots() if hasattr(one.layer, "weight_mask")]
    if not found:
        return ""
    slot = dice.choice(found)
    prune.remove(slot.layer, "weight")
    return f"the pruning of {slot.name} is made permanent"


def old_weight_norm(scene, dice):
    slot = dice.choice(scene.plain_slots() or [None])
    if slot is None:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(slot.layer)
    return f"{slot.name} gets the older weight_norm, {tell(scene, dice)}"


def no_old_weight_norm(scene, dice):
    found = [one for one in scene.slots() if hasattr(one.layer, "weight_g")]
    if not found:
        return ""
    slot = dice.choice(found)
    remove_weight_norm(slot.layer)
    return f"{slot.name} loses the older weight_norm, {tell(scene, dice)}"


# What trains, and with which rate


def frozen(scene, dice):
    slots = []
    for one in scene.slots():
        trains = any(p.requires_grad for p in one.layer.parameters())
        if trains and one.name != scene.net.last_name():
            slots.append(one)
    if not slots:
        return ""
    slot = dice.choice(slots)
    if dice.random() < 0.5 and slot.is_plain:
        slot.layer.weight.requires_grad_(False)
        return f"{slot.name}.weight is frozen"
    slot.layer.requires_grad_(False)
    return f"{slot.name} is frozen"


def thawed(scene, dice):
    still = [p for p in scene.module.parameters() if not p.requires_grad]
    if not still:
        return ""
    scene.module.requires_grad_(True)
    return f"all is unfrozen, {len(still)} of the parameters were frozen"


def groups_of(scene):
    return [(one, group) for one in scene.optimizers for group in one.param_groups]


def own_group(scene, dice):
    """Parameters get a group of their own within their optimizer."""
    optimizer, group = dice.choice(groups_of(scene))
    if len(group["params"]) < 2:
        return ""
    i = dice.randrange(len(group["params"]))
    p = group["params"][i]
    group["params"] = [q for q in group["params"] if q is not p]
    rate = dice.choice([0.02, 0.05])
    optimizer.add_param_group({"params": [p], "lr": rate})
    return f"parameter {i} {tuple(p.shape)} gets a group with the rate {rate}"


def other_group(scene, dice):
    optimizer = dice.choice(scene.optimizers)
    if len(optimizer.param_groups) < 2:
        return ""
    source, target = dice.sample(optimizer.param_groups, 2)
    if not source["params"]:
        return ""
    p = source["params"][0]
    source["params"] = source["params"][1:]
    target["params"] = [*target["params"], p]
    return f"a parameter {tuple(p.shape)} goes into another group"


def removed_group(scene, dice):
    optimizer = dice.choice(scene.optimizers)
    if len(optimizer.param_groups) < 2:
        return ""
    gone = optimizer.param_groups.pop()
    return f"the optimizer loses its last group, of {len(gone['params'])}"


def missing_told(scene, dice):
    """An optimizer gets all that none has."""
    missing = scene.missing()
    if not missing:
        return ""
    dice.choice(scene.optimizers).add_param_group({"params": missing})
    return f"the optimizer gets {len(missing)} parameters that it lacked"


def other_rate(scene, dice):
    factor = dice.choice([0.3, 0.5, 2.0])
    group = dice.choice(groups_of(scene))[1]
    group["lr"] = group["lr"] * factor
    return f"the rate of a group times {factor}"


def rate_as_tensor(scene, dice):
    optimizer, group = dice.choice(groups_of(scene))
    if not isinstance(optimizer, SGD):
        return ""
    group["lr"] = torch.tensor(0.5 * float(group["lr"]), dtype=torch.float32)
    return "half the rate of a group, as a tensor"


OTHERS = [
    lambda parameters: SGD(parameters, lr=0.05),
    lambda parameters: Adam(parameters, lr=0.02, eps=1e-3),
    lambda parameters: AdamW(parameters, lr=0.02, eps=1e-3),
    lambda parameters: RMSprop(parameters, lr=0.004, eps=1e-3),
]


def other_optimizer(scene, dice):
    """Of another class, or of the same; with the old one's parameters, or with all that there are."""
    i = dice.randrange(len(scene.optimizers))
    old = scene.optimizers[i]
    kept = [p for group in old.param_groups for p in group["params"]]
    takes_all = dice.random() < 0.5
    new = dice.choice(OTHERS)(kept + scene.missing() if takes_all else kept)
    scene.optimizers = [*scene.optimizers[:i], new, *scene.optimizers[i + 1 :]]
    return (
        f"optimizer {i} is now {type(new).__name__}, {'with all' if takes_all else 'of the same'}"
    )


# How weights lie in memory


def other_dtype(scene, dice):
    wide = dice.random() < 0.7
    part = dice.choice([scene.net, *(one.layer for one in scene.slots())])
    if any(not isinstance(optimizer, SGD) for optimizer in scene.optimizers):
        return ""  # others refuse states and parameters of different dtypes
    part.double() if wide else part.float()
    return f"{type(part).__name__}.{'double' if wide else 'float'}()"


def other_memory_format(scene, dice):
    last = dice.random() < 0.7
    if not isinstance(scene.net, Pictures):
        return ""
    scene.net.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    return f"net.to(memory_format={'channels_last' if last else 'contiguous_format'})"


def other_data(scene, dice):
    slot = dice.choice(scene.plain_slots() or [None])
    if slot is None:
        return ""
    weight = slot.layer.weight
    data = weight.detach() + 0.3 * dice.normal(*weight.shape, like=weight)
    ways = ["p.data = ...", "p.data.copy_(...)", "p.data = ... laid out by columns"]
    how = dice.choice(ways)
    if how == ways[1]:
        weight.data.copy_(data)
    elif how == ways[2]:
        weight.data = data.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        weight.data = data
    return f"{slot.name}.weight: {how}"


# Gradients


def no_gradient(scene, dice):
    slot = dice.choice(scene.slots())
    for p in slot.layer.parameters():
        p.grad = None
    return f"the gradients of {slot.name} are None"


def nan_gradient(scene, dice):
    held = [p for p in scene.module.parameters() if p.grad is not None]
    if not held:
        return ""
    dice.choice(held).grad.fill_(math.nan)
    return "a gradient is NaN"


SIDES = ("before", "after", "module")
"""A callback before ours in the Trainer's list, one after ours, and the LightningModule itself."""

BETWEEN = tuple(
    f"{side} {hook}"
    for hook in (
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_end",
    )
    for side in SIDES
)
QUIET = (*BETWEEN, "training_step")
WITHIN = tuple(
    f"{side} {hook}"
    for hook in (
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
    )
    for side in SIDES
)
ANYWHERE = (*QUIET, "after the forward pass", *WITHIN, "after the step")
AFTER_BACKWARD = tuple(place for place in WITHIN if "after_backward" in place)
WITH_GRADIENTS = (*AFTER_BACKWARD, *(place for place in WITHIN if "optimizer_step" in place))


@dataclass(frozen=True)
class Event:
    """One kind of event.

    Args:
        name: What it is called.
        apply: Does it to a scene with dice; returns what it did in words, "" for nothing.
        places: Where it may happen.
        often: How often it is drawn, beside the others.
        later: Names of events that may follow, such as the one that takes it back.
        fits: Whether a draw may have it.
    """

    name: str
    apply: Callable[[Scene, Dice], str]
    places: tuple[str, ...] = ANYWHERE
    often: int = 1
    later: tuple[str, ...] = ()
    fits: Callable[[Any], bool] = lambda draw: True


def has_scaler(draw):
    return draw.precision == "scaler"


def is_whole(draw):
    return draw.precision in ("fp32", "64-true")


UNTOLD = ("missing told",)

EVENTS = {
    event.name: event
    for event in (
        Event("new parameter", new_parameter, often=3, later=UNTOLD),
        Event("assigned state", assigned_state, often=2, later=UNTOLD),
        Event("fresh module", fresh_module, often=3, later=UNTOLD),
        Event("another width", another_width, often=2, later=UNTOLD),
        Event("swapped", swapped, often=2),
        Event("copied net", copied_net, later=UNTOLD),
        Event("added layer", added_layer, often=3, later=("removed layer", *UNTOLD)),
        Event("removed layer", removed_layer, often=2, later=("added layer",)),
        Event("new head", new_head, QUIET, often=2, later=("new head", *UNTOLD)),
        Event("tied", tied, often=3, later=("untied",)),
        Event("untied", untied, often=0, later=UNTOLD),
        Event("shared module", shared_module),
        Event("parametrized", parametrized, QUIET, often=3, later=("unparametrized", *UNTOLD)),
        Event("unparametrized", unparametrized, QUIET, often=0, later=UNTOLD),
        Event("pruned", pruned, often=2, later=("unpruned",)),
        Event("unpruned", unpruned, often=0),
        Event("old weight_norm", old_weight_norm, QUIET, often=2, later=("no old weight_norm",)),
        Event("no old weight_norm", no_old_weight_norm, QUIET, often=0, later=UNTOLD),
        Event("frozen", frozen, often=3, later=("thawed",)),
        Event("thawed", thawed, often=0),
        Event("own group", own_group, often=2, later=("other group", "removed group")),
        Event("other group", other_group, often=0),
        Event("removed group", removed_group, often=0, later=UNTOLD),
        Event("missing told", missing_told, QUIET, often=0),
        Event("other rate", other_rate, often=2, later=("other rate",)),
        Event("rate as tensor", rate_as_tensor, often=2, later=("other rate",)),
        Event("other optimizer", other_optimizer, BETWEEN, often=3, later=("other optimizer",)),
        Event("other dtype", other_dtype, BETWEEN, often=2, fits=is_whole),
        Event("other memory format", other_memory_format, QUIET, often=2),
        Event("other data", other_data, (*QUIET, *WITH_GRADIENTS, "after the step"), often=2),
        Event("no gradient", no_gradient, WITH_GRADIENTS, often=2),
        Event("NaN gradient", nan_gradient, AFTER_BACKWARD, often=6, fits=has_scaler),
    )
}
