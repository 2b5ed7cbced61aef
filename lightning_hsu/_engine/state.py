"""What training carries from step to step: counts, states of measures, means of shares."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_hsu._core import exact_arithmetic
from lightning_hsu._engine.change import Change
from lightning_hsu._engine.deltas import Deltas
from lightning_hsu._engine.layer import Layer, to_compute_dtype
from lightning_hsu._engine.misuse import CallOrder, PenaltyChecks
from lightning_hsu._engine.rates import Rate, held_by
from lightning_hsu._engine.stored import (
    VERSION,
    Dropped,
    checked,
    drop_unfit,
    kind_of,
    needing_means,
    needing_state,
    note_renamed,
    on_device,
)
from lightning_hsu._engine.strength import Finding
from lightning_hsu.coefficients import Share, strength_at
from lightning_hsu.measures import State


class StepCounter:
    """Steps done by each optimizer, by its position or by the order of their first steps."""

    def __init__(self) -> None:
        self.done: list[int] = []
        # Those without a position, with the ids of their parameters.
        self._optimizers: list[tuple[weakref.ref[Optimizer], set[int]]] = []

    def before(
        self, optimizer: Optimizer, index: int | None = None, *, same_step: bool = False
    ) -> int:
        """Return the steps done before this one; the ``same_step`` again is counted already."""
        done = self.done[self._position(optimizer, index)]
        return max(done - 1, 0) if same_step else done

    def count(
        self, optimizer: Optimizer, index: int | None = None, *, same_step: bool = False
    ) -> None:
        """Count a step, unless it is the ``same_step`` again."""
        if not same_step:
            self.done[self._position(optimizer, index)] += 1

    def restore(self, done: Sequence[int]) -> None:
        """Restore counts; they belong to the next optimizers, in the order of their steps."""
        self.done = list(done)
        self._optimizers = []

    def forget_optimizers(self) -> None:
        """Release the optimizers; the counts stay."""
        self._optimizers = []

    def _position(self, optimizer: Optimizer, index: int | None) -> int:
        if index is None:
            index = self._order_of(optimizer)
        missing = index + 1 - len(self.done)
        self.done += [0] * missing
        return index

    def _order_of(self, optimizer: Optimizer) -> int:
        """How many other optimizers stepped before this one did so first.

        One that is gone hands its place, and its count, to another of the same parameters.
        """
        for i, (known, _) in enumerate(self._optimizers):
            if known() is optimizer:
                return i
        held = held_by(optimizer)
        for i, (known, former) in enumerate(self._optimizers):
            if known() is None and not former.isdisjoint(held):
                self._optimizers[i] = weakref.ref(optimizer), held
                return i
        self._optimizers.append((weakref.ref(optimizer), held))
        return len(self._optimizers) - 1

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy the counts, never the optimizers."""
        return {"done": list(self.done), "_optimizers": []}


class MeasureStates:
    """What the measures carry from step to step: witnesses, projections, numbers of draws.

    The states are the same on all ranks, since the same weights and seeds made them.
    """

    def __init__(self) -> None:
        self.by_layer: dict[str, State] = {}
        self.measures: dict[str, str] = {}  # whose states these are, by layer
        self._model: weakref.ref[nn.Module] | None = None
        self._is_loaded = False  # and no step was done since

    def attach(self, model: nn.Module) -> bool:
        """Drop another model's states; return whether the model is another.

        States that were just loaded belong to the first model attached.
        """
        another = self._model is not None and self._model() is not model
        if another:
            self.by_layer = {}
        self._model = weakref.ref(model)
        return another

    def next(self, layer: Layer, x: Tensor) -> State | None:
        """Prepare the layer's measure for neurons x (groups, n, d), and keep the state."""
        state = self.peek(layer, x)
        self._is_loaded = False
        if state is not None:
            self.by_layer[layer.name] = state
            self.measures[layer.name] = kind_of(layer.measure)
        return state

    def peek(self, layer: Layer, x: Tensor) -> State | None:
        """Prepare the layer's measure for neurons x (groups, n, d) without keeping the state."""
        known = self.by_layer.get(layer.name)
        if known is not None:
            known = {name: on_device(part, x) for name, part in known.items()}
        with exact_arithmetic(x):  # a hook may run within autocast
            return layer.measure.prepare(x.detach(), known)

    def state_dict(self) -> dict[str, State]:
        """The states by layer."""
        return {name: dict(state) for name, state in self.by_layer.items()}

    def restore(self, states: dict[str, State], measures: dict[str, str]) -> None:
        """Restore checked states by layer, and the names of their measures."""
        self.by_layer = states
        self.measures = measures
        self._model = None
        self._is_loaded = bool(states)

    def check(self, layers: Sequence[Layer], dropped: Dropped) -> None:
        """Drop states that were just loaded and do not fit the layers of the model attached."""
        if self._is_loaded:
            note_renamed("states", self.by_layer, needing_state(layers), layers, dropped)
            drop_unfit(self.by_layer, self.measures, layers, dropped)

    def __getstate__(self) -> dict[str, object]:
        """Pickle and copy the states, never the model."""
        return self.__dict__ | {"_model": None}


class ShareMeans:
    """Running means of gradient norms by layer, (task's, penalty's); the same on all ranks."""

    def __init__(self) -> None:
        self.means: dict[str, Tensor] = {}
        self._is_loaded = False  # and no step was done since

    def update(self, name: str, share: Share, task: Tensor, penalty: Tensor) -> None:
        """Update a layer's means with the norms of one step, if these are finite."""
        self.update_several([name], share, torch.stack([task, penalty])[None])

    def update_several(self, names: Sequence[str], share: Share, norms: Tensor) -> None:
        """Update the means of k layers with their norms (k, 2), where both are finite."""
        self._is_loaded = False
        rows = []
        for name in names:
            known = self.means.get(name)
            rows.append(norms.new_zeros(2) if known is None else known.to(norms))
        before = torch.stack(rows)
        mixed = share.smoothing * before + (1.0 - share.smoothing) * norms
        after = torch.where(torch.isfinite(norms).all(1, keepdim=True), mixed, before)
        for name, mean in zip(names, after.unbind(), strict=True):
            self.means[name] = mean

    def coefficient(self, name: str, share: Share) -> Tensor | float:
        """Return a layer's coefficient without host-device synchronisation; 0 before any step."""
        if name not in self.means:
            return 0.0
        task, penalty = self.means[name]
        smallest = torch.finfo(penalty.dtype).tiny
        value: Tensor = share.fraction * task / penalty.clamp_min(smallest)
        return value.clamp_max(share.maximum)

    def state_dict(self) -> dict[str, Tensor]:
        """The means by layer."""
        return dict(self.means)

    def restore(self, means: dict[str, Tensor]) -> None:
        """Restore checked means by layer."""
        self.means = means
        self._is_loaded = bool(means)

    def check(self, layers: Sequence[Layer], dropped: Dropped) -> None:
        """Note layers whose means may have been stored under other names."""
        if self._is_loaded:
            note_renamed("shares", self.means, needing_means(layers), layers, dropped)


@dataclass
class SinceAttach:
    """What is known about the attached model; replaced when the model is released.

    Attributes:
        coefficients: The coefficient of each layer at its last step.
        reached: Layers that some optimizer stepped, or was about to, with a gradient, since the
            last measurement.
        reached_before: The same of earlier steps, in this epoch under Lightning.
        versions: Versions of the layers' parameters at the last measurement.
        loss_step: The step of the last penalty in a loss; None if it has no number.
        change: What has changed in the model since somebody last asked; None if nothing has.
        ended: Names of the layers that came last before some loss since the model was changed;
            None if it was not.
        told: What was warned of.
        untold: Layers of new weights that no optimizer has had so far, with the steps since.
        order: Whether the calls of a loop are in order.
        penalties: Whether penalties in losses can act.
        movers: Ids of the optimizers after whose steps neurons have moved.
        zeros: Layers that start at zero, of which the first step tells.
        findings: What a Trainer's callback has to tell of the penalty's strength.
    """

    coefficients: dict[str, Tensor | float] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    reached_before: set[str] = field(default_factory=set)
    versions: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    loss_step: int | None = None
    change: Change | None = None
    ended: set[str] | None = None
    told: set[str] = field(default_factory=set)
    untold: dict[str, int] = field(default_factory=dict)
    order: CallOrder = field(default_factory=CallOrder)
    penalties: PenaltyChecks = field(default_factory=PenaltyChecks)
    movers: set[int] = field(default_factory=set)
    zeros: list[Layer] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


class TrainingState:
    """Where training stands; the same on all ranks.

    Attributes:
        counter: Steps done by each optimizer: schedules and ``every_n_steps`` count in them.
        measure_states: What measures carry from step to step.
        share_means: Means of the gradients' norms.
        heads: Names of the layers that acted last before the loss at the first forward pass; [] if
            that is not known.
        heads_as_expected: Whether they are found without a forward pass, too.
        deltas: Gradients that are kept from step to step.
        now: What is known about the attached model.

    Args:
        tolerance: The relative error of kept gradients on average; None keeps none.
    """

    def __init__(self, tolerance: float | None = None) -> None:
        self.heads: list[str] = []
        self.deltas = Deltas(tolerance)
        self.heads_as_expected = False
        self.counter = StepCounter()
        self.measure_states = MeasureStates()
        self.share_means = ShareMeans()
        self.now = SinceAttach()
        self._monitor_states = MeasureStates()

    def attach(self, model: nn.Module) -> None:
        """Drop another model's states and means, and what was known about the last model."""
        self._monitor_states.attach(model)
        if self.measure_states.attach(model):
            self.share_means = ShareMeans()
            self.heads = []
            self.counter.forget_optimizers()
            self.deltas.forget()
        self.deltas.make_due()
        self.now = SinceAttach()

    def detach(self) -> None:
        """Release the model and its optimizers; counts, states and means stay."""
        self.counter.forget_optimizers()
        self.deltas.make_due()
        self.now = SinceAttach()

    def forget_measure(self) -> None:
        """Forget what belongs to a measure, since another one has come."""
        self.measure_states = MeasureStates()
        self.share_means = ShareMeans()
        self.deltas.forget()
        self._monitor_states = MeasureStates()

    def coefficient(self, layer: Layer, step: int) -> Tensor | float:
        """Note and return the coefficient of a layer at a step."""
        strength = layer.strength
        value: Tensor | float
        if isinstance(strength, float):
            value = strength
        elif isinstance(strength, Share):
            value = self.share_means.coefficient(layer.name, strength)
        else:
            value = strength_at(strength, step, layer.name)
        self.now.coefficients[layer.target.name] = value
        return value

    def last_coefficient(self, layer: Layer, every_n_steps: int) -> float:
        """Return the coefficient of a layer at its last step, even after a resume.

        Before any step it is the coefficient that the layer starts with.
        """
        if layer.name not in self.now.coefficients:
            last = max([0, *(done - 1 for done in self.counter.done)])
            self.coefficient(layer, last - last % every_n_steps)
        return float(self.now.coefficients[layer.name])

    def note_reached(self, layers: Sequence[Layer], learning_rates: Mapping[int, Rate]) -> None:
        """Note the layers that an optimizer with these learning rates, by parameter id, reaches."""
        for layer in layers:
            if layer.rates(learning_rates):
                self.now.reached.add(layer.name)

    def note_change(self, change: Change, layers: Sequence[Layer]) -> None:
        """Note a change of the model, which has these layers now."""
        if self.now.change is not None:
            self.now.change.add(change)
        elif change:
            self.now.change = change
        self.now.ended = set()
        for name in (*change.added, *change.renewed):
            if name not in change.origins:
                self.now.untold[name] = 0
        for old, new in change.renamed.items():
            self._rename(old, new)
        self.now.reached = _carried(self.now.reached, change.origins)
        self.now.reached_before = _carried(self.now.reached_before, change.origins)
        self.deltas.follow(change.origins, layers)
        self.now.order.follow(layers)

    def _rename(self, old: str, new: str) -> None:
        """Let a layer of another name go on where it stood."""
        by_name: tuple[dict[str, Any], ...] = (
            self.measure_states.by_layer,
            self.measure_states.measures,
            self.share_means.means,
            self.now.coefficients,
        )
        for known in by_name:
            if old in known:
                known[new] = known.pop(old)
        self.heads = [new if name == old else name for name in self.heads]

    def is_trained(self, layer: Layer) -> bool:
        """Whether a layer's weights change: of a frozen one, since the last measurement.

        Some programs freeze a network whenever it is another one's turn.
        """
        if not layer.frozen or layer.name in self.now.reached:
            return True
        known = self.now.versions.get(layer.name)
        return known is not None and not layer.target.in_copy and known != layer.versions

    def settle(self, layers: Sequence[Layer]) -> None:
        """Note that layers have been measured."""
        self.now.reached_before |= self.now.reached
        self.now.reached = set()
        self.now.versions = {layer.name: layer.versions for layer in layers}

    def begin_epoch(self) -> None:
        """Forget which layers were reached: each is to be reached in every epoch."""
        self.now.reached = set()
        self.now.reached_before = set()

    def take_change(self) -> Change | None:
        """What has changed since this was last asked; None if nothing has."""
        change = self.now.change
        self.now.change = None
        return change

    def measure_state(self, layer: Layer, x: Tensor, *, same_step: bool) -> State | None:
        """Return the state of a layer's measure for its neurons x (groups, n, d).

        Within the ``same_step`` there is no new draw.
        """
        if not layer.measure.has_state:
            return None
        if same_step and layer.name in self.measure_states.by_layer:
            return self.measure_states.by_layer[layer.name]
        return self.measure_states.next(layer, to_compute_dtype(x))

    def monitor_state(self, layer: Layer, x: Tensor) -> State | None:
        """Return a state for monitoring neurons x (groups, n, d), without any effect on training.

        It continues from training's state, or else from that of the last monitoring.
        """
        if not layer.measure.has_state:
            return None
        if layer.name in self.measure_states.by_layer:
            return self.measure_states.peek(layer, x)
        return self._monitor_states.next(layer, x)

    def state_dict(self) -> dict[str, Any]:
        """Counts, and states and means by layer if there are any: plain types and tensors."""
        state: dict[str, Any] = {"version": VERSION, "steps": list(self.counter.done)}
        if self.measure_states.by_layer:
            state["states"] = self.measure_states.state_dict()
            state["measures"] = dict(self.measure_states.measures)
        if self.share_means.means:
            state["shares"] = self.share_means.state_dict()
        if self.heads and not self.heads_as_expected:
            state["heads"] = list(self.heads)
        if self.deltas.tolerance is not None and self.deltas.reuse:
            state["reuse"] = self.deltas.state_dict()
            state["work"] = self.deltas.work.state()
        return state

    def load_state_dict(self, state: object) -> Dropped:
        """Restore what :meth:`state_dict` returned, as far as it can be used; return the rest."""
        stored = checked(state)
        self.counter.restore(stored.steps)
        self.measure_states.restore(stored.states, stored.measures)
        self.share_means.restore(stored.shares)
        self.heads = stored.heads
        self.heads_as_expected = False
        self.deltas.restore(stored.reuse, stored.work)
        self.now.loss_step = None
        return stored.dropped

    def check(self, layers: Sequence[Layer], dropped: Dropped) -> None:
        """Drop what was just loaded and does not fit the layers of the model attached.

        Where ranks share the weights, all must call it, while these are whole.
        """
        self.measure_states.check(layers, dropped)
        self.share_means.check(layers, dropped)


def _carried(names: set[str], origins: Mapping[str, str]) -> set[str]:
    """The names that layers have now which had these; fresh weights are not among them."""
    return {now for now, before in origins.items() if before in names}
