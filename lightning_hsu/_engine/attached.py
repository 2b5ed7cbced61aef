"""A model as the regularizer holds it: its layers, its heads, and the plan of a step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from lightning_hsu._engine.ahead import Ahead
from lightning_hsu._engine.change import Change, compare
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.plan import Plan
from lightning_hsu._engine.strength import StrengthWatch
from lightning_hsu._engine.watch import Watch
from lightning_hsu._neurons.candidates import Candidates, Skip
from lightning_hsu._neurons.how import StoredValues
from lightning_hsu._neurons.placement import Placement
from lightning_hsu._neurons.select import find_heads
from lightning_hsu._neurons.target import Target
from lightning_hsu._neurons.trace import last_before, parameters_behind
from lightning_hsu._optimizers import AfterOwnStep


class HeadFinder(Protocol):
    """What takes a model's outputs to find its head."""

    def see_outputs(self, outputs: object) -> None:
        """Take the layers that act last before these outputs for the head."""


Find = Callable[[bool], Candidates[Target]]
"""Finds all sets of neurons of the model; told whether it refuses what the user says wrongly."""

Choose = Callable[[Candidates[Target], Sequence[str], bool], tuple[list[Target], list[Skip]]]
"""Chooses among them, given the names of the layers that came last before the loss, alike."""


class Attached:
    """A model as the regularizer holds it.

    Args:
        model: The model, without wrappers.
        placement: How its weights are placed over the ranks.
        find: Finds all sets of neurons in it.
        choose: Chooses among them.
        make_layer: Gives a target its measure and coefficient; what else there is to know of it is
            read, or taken from a layer of the same name.
        traced: Names of the layers that came last before the loss; [] if that is not known.

    Attributes:
        candidates: All sets of neurons in the model.
        layers: The layers that are measured.
        skips: The weights that are not, with the reasons.
        plan: The plan of a step.
        watch: Sees what changes in the model.
        strength: Watches how strong the penalty is.
        coverage: Measured entries over those of all weights with two or more axes; NaN if there are
            none.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        find: Find,
        choose: Choose,
        make_layer: Callable[[Target, Layer | None], Layer],
        traced: Sequence[str],
    ) -> None:
        self.model = model
        self.placement = placement
        self._find = find
        self._choose = choose
        self._make_layer = make_layer
        self._snapshots: set[nn.Module] = set()
        self._strict = True  # what the user said of the model need not be true of a changed one
        self.layers: list[Layer] = []
        self.skips: list[Skip] = []
        self.coverage = float("nan")
        self.strength = StrengthWatch(placement)
        self.ahead = Ahead()
        # On optimizers, by their id; these keep them.
        self.hooks: dict[int, weakref.ref[AfterOwnStep]] = {}
        self.plan: Plan
        self.candidates = find(self._strict)
        self.choose(traced)
        self.watch = self._watched()

    def choose(self, traced: Sequence[str]) -> None:
        """Choose the layers among the sets of neurons.

        Args:
            traced: Names of the layers that came last before the loss; [] if that is not known.
        """
        known = {layer.name: layer for layer in self.layers}
        targets, self.skips = self._choose(self.candidates, self.known(traced), self._strict)
        kept = []
        for target in targets:
            if target.module in self._snapshots:
                target = replace(target, in_copy=True, trains=False)
            # FSDP2 may show other parameters between a forward pass and its backward pass.
            layer = self._make_layer(target, known.get(target.name))
            reason = layer.why_refused()
            if reason is None:
                kept.append(layer)
            else:
                self.skips.append(Skip(layer.name, layer.target.shape, reason))
        self._take(kept)
        if not known or {layer.name for layer in kept} != set(known):
            self.coverage = _coverage(self.model, kept)

    def follow(self, traced: Sequence[str]) -> Change:
        """Find the layers anew, since the model has changed.

        Args:
            traced: Names of the layers that came last before the loss; [] if that is not known.
        """
        before = self.layers
        self._strict = False
        self.layers = []
        self.placement.take_back_weights(self.model)
        try:
            known = {one.module for one in self.candidates.sets}
            self.candidates = self._find(self._strict)
            self._snapshots = self._find_snapshots(known)
            self.choose(traced)
        except Exception as error:  # in somebody else's code: the training goes on
            reason = f"looking at the model failed with {type(error).__name__}: {error}"
            self.skips = [Skip(one.name, one.target.shape, reason) for one in before]
            self._take([])
        self.watch = self._watched(self.watch)
        return compare(before, self.layers, self.skips, self.model)

    def release(self) -> None:
        """Take hooks off optimizers, and end what is under way between ranks.

        After an error of this rank others may never answer: then that is left to the process's end.
        """
        for known in self.hooks.values():
            hook = known()
            if hook is not None:
                hook.remove()
        if sys.exc_info()[0] is None:
            self.ahead.drop()
            self.placement.release()

    def _find_snapshots(self, known: Set[nn.Module]) -> set[nn.Module]:
        """New modules that hold the weights of others as they are now, and that nothing trains.

        Users keep such copies: the best model so far, or the one before an average.
        """
        found: set[nn.Module] = set()
        if not self.watch.has_optimizers:  # a penalty in a loss says nothing of what trains
            return found
        old = [one for one in self.candidates.sets if one.module in known]
        for one in self.candidates.sets:
            if self.watch.optimizes(one.parameters()):
                continue
            if one.module in self._snapshots:
                found.add(one.module)
            if one.module in known:
                continue
            x = one.neurons()
            twins = [other.neurons() for other in old if other.shape == one.shape]
            if any(torch.equal(x.to(twin), twin) for twin in twins):
                found.add(one.module)
        return found

    def _take(self, layers: list[Layer]) -> None:
        """Take these layers, with a new plan."""
        self.layers = layers
        self.plan = Plan(layers, self.placement)
        self.ahead.drop()

    def _watched(self, before: Watch | None = None) -> Watch:
        """A watch over the model as it is now."""
        idle = {id(p) for module in self._snapshots for p in module.parameters()}
        return Watch(self.model, self.candidates.sets, self.layers, self.placement, before, idle)

    def known(self, names: Sequence[str]) -> list[str]:
        """Those of the names that this model has, measured or not."""
        parameters = {name for name, _ in self.model.named_parameters()}
        sets = {one.name for one in self.candidates.sets}
        return [name for name in names if name in sets or name in parameters]

    def expects(self, heads: Sequence[str]) -> bool:
        """Whether these heads would be chosen without a forward pass, too."""
        without = set(find_heads(self.candidates, "auto"))
        return set(find_heads(self.candidates, "auto", heads)) == without

    def last_before(self, outputs: object) -> list[str]:
        """Names of the sets that act last on the way to a loss or to a model's outputs.

        Parameters that are no set of neurons have their own names.
        """
        layers: dict[int, list[str]] = {}
        tables: dict[int, list[str]] = {}  # embeddings, and matrices that are not measured
        codes: dict[int, list[str]] = {}  # whose own loss comes after nothing
        by_kind = {"embedding": tables, "codebook": codes}
        computed = []
        for target in self.candidates.sets:
            parameters = target.parameters()
            if len(parameters) > 1 or target.read().parameter is None:
                computed.append(target.name)
            for p in parameters:
                names = by_kind.get(target.kind, layers)
                names.setdefault(id(p), []).append(target.name)
        for name, p in self.model.named_parameters():
            if p.ndim >= 2 and id(p) not in layers and id(p) not in codes:
                tables.setdefault(id(p), [name])
        for stand_in, p in self.placement.stand_ins(self.model).items():
            for known in (layers, tables):
                if id(p) in known:
                    known[stand_in] = known[id(p)]
        only_tables = {key: names for key, names in tables.items() if key not in layers}
        return last_before(outputs, layers, only_tables, computed)

    def acting_in(self, outputs: object) -> set[str] | None:
        """Names of the sets on which outputs depend; None if these are of an earlier model.

        They are where a layer has been replaced between a forward pass and its backward pass.
        """
        own = {id(p): p for p in self.model.parameters()}
        stand_ins = self.placement.stand_ins(self.model)
        used = set()
        for p in parameters_behind(outputs):
            p = stand_ins.get(id(p), p)
            if id(p) in own:
                used.add(id(p))
            elif isinstance(p, nn.Parameter):
                return None
        names = set()
        for target in self.candidates.sets:
            if any(id(p) in used for p in target.parameters()):
                names.add(target.name)
        return names


class FirstOutputs:
    """A forward hook that shows a regularizer the model's outputs at its first training forward.

    Copies and pickles of the model, which take its hooks along, get one that does nothing.

    Args:
        owner: The regularizer; it is not kept alive.
    """

    def __init__(self, owner: HeadFinder | None = None) -> None:
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, module: nn.Module, inputs: object, outputs: object) -> None:
        """Show the outputs once, if they have a graph; a compiled forward has none by layer."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        if torch._C._functorch.peek_interpreter_stack() is not None:  # within torch.func
            return
        owner = None if self._owner is None else self._owner()
        if owner is None or not module.training or not torch.is_grad_enabled():
            return
        self._owner = None
        owner.see_outputs(outputs)

    def __reduce__(self) -> tuple[type[FirstOutputs], tuple[()]]:
        return FirstOutputs, ()


def _coverage(model: nn.Module, layers: Sequence[Layer]) -> float:
    """Entries measured over the entries of all floating parameters of two or more axes."""
    entries = {}
    for p in model.parameters():
        if p.ndim >= 2 and p.is_floating_point() and not p.is_nested:
            entries[id(p)] = p.numel()
    measured = dict.fromkeys(entries, 0)
    for layer in layers:
        groups, n, d = layer.target.shape
        rule = layer.target.rule
        if isinstance(rule, StoredValues):
            stored = id(getattr(layer.target.module, rule.attribute))
            if stored in entries:
                measured[stored] = entries[stored]
        for p in layer.parameters:
            if id(p) not in entries:
                continue
            whole = entries[id(p)]
            # One parameter may hold several layers. Of several that make one layer, all counts.
            part = groups * n * d if len(layer.parameters) == 1 else whole
            measured[id(p)] = min(whole, measured[id(p)] + part)
    total = sum(entries.values())
    if total == 0:
        return float("nan")
    return sum(measured.values()) / total
