"""Gradients of plain layers computed right after a step, for the next one.

The penalty's gradient depends on the weights alone, which stay as they are from one step to the
next. On a GPU it is computed on a stream of its own, while the task's forward and backward pass
run. On a CPU there is nothing that hides it: there it is computed when it is needed.

A layer whose weights were changed in between is computed again. Torch counts such changes, except
those through ``p.data``. These show in the norms, which are compared on the device and read a step
later: the layer is then left to the time before the step, with a warning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_hsu._checks import listed
from lightning_hsu._core.raw import GroupNumbers, RawPart, group_numbers
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu._engine.late import (
    LateChecks,
    LateNumbers,
    SideWork,
    beside,
    keep_for_current,
    keep_for_side,
)
from lightning_hsu._engine.layer import Layer, Token, token_of
from lightning_hsu._engine.sharing import Gradients, PlainUpdate, begin_raw, is_shared
from lightning_hsu._engine.warn import warn
from lightning_hsu._neurons.placement import Placement


@dataclass(eq=False)
class _Begun:
    """A stack of gradients whose computation has begun.

    Args:
        raw: The gradients.
        layers: Their layers, in the order of the stack.
        tokens: The states of these layers' weights.
        norms: The norms of these weights, shape (k,).
        numbers: What a logging step needs, if that was asked for.
        work: When it is done.
        columns: The first entries of their neurons, by layer, if ranks train together.
        messages: Those of other ranks on which it depends, if it does.
    """

    raw: RawPart
    layers: list[Layer]
    tokens: list[Token | None]
    norms: Tensor
    numbers: GroupNumbers | None
    work: SideWork
    columns: list[Tensor] | None = None
    messages: Gradients | None = None

    def is_taken_back(self, place: int, update: GradientUpdate) -> bool:
        """Whether weights that were written to are those of the computation again; the host waits.

        One rank alone may have put others in their place, as for an evaluation. It must go on with
        the bits of the other ranks: by its own it might compute layers at other steps than they.
        """
        if self.columns is None:
            return False
        now, then = _column(update), self.columns[place]
        if (now.shape, now.dtype, now.device) != (then.shape, then.dtype, then.device):
            return False
        return torch.equal(now, then) and bool(_norms([update])[0] == self.norms[place])


@dataclass(frozen=True, eq=False)
class _BegunNumbers:
    """What a logging step needs of a stack of layers, begun without their gradients.

    Args:
        numbers: The numbers.
        layers: The layers, in the order of the stack.
        tokens: The states of their weights.
        work: When it is done.
    """

    numbers: GroupNumbers
    layers: list[Layer]
    tokens: list[Token | None]
    work: SideWork


class Ahead:
    """The gradients that were computed after the last step.

    Attributes:
        begun: Stacks of them.
        outdated: Layers whose gradients were asked for last, and are of other weights. Where ranks
            share work, each computes these by itself: no rank can tell what others have seen.
    """

    def __init__(self) -> None:
        self.begun: list[_Begun] = []
        self.outdated: set[Layer] = set()
        self._measured: list[_BegunNumbers] = []
        self._checks = LateChecks()
        self._unseen: set[str] = set()  # layers whose weights change without torch's counting it

    def begin(
        self, found: Iterable[PlainUpdate], placement: Placement, *, stats: bool = False
    ) -> None:
        """Begin to compute the gradients of these layers, anew if that was begun before.

        Where ranks compute layers for one another, this is a collective call: they begin the same
        layers, also those that one of them would leave out. Their messages are under way until
        someone takes the gradients.

        Args:
            found: The layers.
            placement: How their weights are placed over the ranks.
            stats: Also compute what a logging step needs of layers on a GPU.
        """
        found = list(found)
        _abandon(self._take_out({layer for layer, _, _ in found}))
        by_device: dict[torch.device, list[PlainUpdate]] = {}
        for one in found:
            layer, _, update = one
            if self.may_begin(layer, token_of(layer)) or is_shared(layer, placement):
                by_device.setdefault(update.entries.device, []).append(one)
        for device, members in by_device.items():
            with beside(device):
                for _, _, update in members:
                    keep_for_side(update.entries)
                work = begin_raw(members, placement, stats=stats, beside=True)
                try:
                    own = list(work.own)
                except BaseException:
                    work.from_ranks.abandon()
                    raise
                for raws, messages in ((own, None), (work.shared, work.from_ranks)):
                    for raw in raws:
                        begun = _begun(raw, members, device)
                        begun.messages = messages
                        if not placement.is_alone:
                            begun.columns = _columns(raw, members)
                        self.begun.append(begun)

    def begin_numbers(self, found: Iterable[PlainUpdate]) -> None:
        """Begin what a logging step needs of those of these layers whose gradients do not bring it.

        Args:
            found: The layers.
        """
        found = list(found)
        again = {layer for layer, _, _ in found}
        self._measured = [one for one in self._measured if again.isdisjoint(one.layers)]
        known: set[Layer] = set()
        for begun in self.begun:
            if begun.numbers is not None:
                known.update(begun.layers)
        by_device: dict[torch.device, list[PlainUpdate]] = {}
        for one in found:
            layer, _, update = one
            if layer not in known and self.may_begin(layer, token_of(layer)):
                by_device.setdefault(update.entries.device, []).append(one)
        for device, members in by_device.items():
            with beside(device):
                work = []
                for _, term, update in members:
                    keep_for_side(update.entries)
                    work.append((update, term))
                for numbers in group_numbers(work):
                    layers = [members[place][0] for place in numbers.places]
                    tokens = [token_of(layer) for layer in layers]
                    one_stack = _BegunNumbers(numbers, layers, tokens, SideWork(device))
                    self._measured.append(one_stack)

    def may_begin(self, layer: Layer, token: Token | None) -> bool:
        """Whether what is begun of a layer's weights is likely to be right at the next step."""
        return token is not None and layer.name not in self._unseen

    def leave_out(self, layers: Sequence[Layer]) -> None:
        """Begin nothing more of layers whose weights have changed although torch counts no change."""
        named = []
        for layer in layers:
            if layer.name not in self._unseen:
                self._unseen.add(layer.name)
                named.append(f"'{layer.name}' {layer.target.shape}")
        if named:
            warn(
                f"the weights of layer {listed(named)} change between optimizer.step() and the next "
                "step without torch's counting it, as through p.data: one penalty gradient was that "
                "of the weights before. From now on it is computed just before the step there. "
                "Changing p itself under torch.no_grad() keeps the faster way"
            )

    def take(self, found: Sequence[PlainUpdate]) -> list[tuple[RawPart, list[Layer]]]:
        """The gradients of those of these layers for which they are still right, with the layers."""
        taken = []
        for begun, updates in self._still_right({layer: update for layer, _, update in found}):
            places = []
            layers = []
            for place, layer in enumerate(begun.layers):
                if layer in updates:
                    places.append(place)
                    layers.append(layer)
            for raw in begun.raw.only(places):
                count = len(raw.places)
                taken.append((raw, layers[:count]))
                del layers[:count]
        return taken

    def add(self, found: Sequence[PlainUpdate]) -> list[PlainUpdate]:
        """Add the gradients to their layers; return the layers that still need one."""
        left = {layer: (layer, term, update) for layer, term, update in found}
        for raw, layers in self.take(found):
            raw.add_to([left.pop(layer)[2] for layer in layers])
        return list(left.values())

    def numbers(self, layers: set[Layer]) -> list[tuple[GroupNumbers, list[Layer]]]:
        """What a logging step needs of stacks of layers of which the weights are still the same."""
        found = []
        stacks: list[_Begun | _BegunNumbers] = [*self.begun, *self._measured]
        for begun in stacks:
            if begun.numbers is None or not layers.issuperset(begun.layers):
                continue
            if [token_of(layer) for layer in begun.layers] == begun.tokens:
                begun.work.wait()
                keep_for_current(begun.numbers.numbers.values)
                found.append((begun.numbers, begun.layers))
        return found

    def stacks(self) -> dict[Layer, object]:
        """What stands for the stack that holds each layer of which something is begun."""
        return {layer: begun for begun in self.begun for layer in begun.layers}

    def drop(self) -> None:
        """Drop what has been begun, once its messages have come."""
        _abandon(self.begun)
        self.begun = []
        self._measured = []
        self._checks.drop()

    def _still_right(
        self, updates: dict[Layer, GradientUpdate]
    ) -> list[tuple[_Begun, dict[Layer, GradientUpdate]]]:
        """Take the stacks of these layers, each with the updates of those whose weights are the same."""
        found = []
        self.outdated = set()
        taken = self._take_out(updates.keys())
        _wait_for_messages(taken)
        for begun in taken:
            begun.work.wait()
            for x in [*begun.raw.tensors(), begun.norms, *(begun.columns or ())]:
                keep_for_current(x)
            same = {}
            places = []
            for place, (layer, token) in enumerate(zip(begun.layers, begun.tokens, strict=True)):
                if layer not in updates:
                    continue
                is_same = token_of(layer) == token and self.may_begin(layer, token)
                if is_same or begun.is_taken_back(place, updates[layer]):
                    same[layer] = updates[layer]
                    places.append(place)
                else:
                    self.outdated.add(layer)
            if same:
                self._check(begun, places, same)
                found.append((begun, same))
        return found

    def _take_out(self, layers: Set[Layer]) -> list[_Begun]:
        """Take out the stacks that hold any of these layers."""
        chosen, others = [], []
        for begun in self.begun:
            if layers.isdisjoint(begun.layers):
                others.append(begun)
            else:
                chosen.append(begun)
        self.begun = others
        return chosen

    def changed_unseen(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of which a step has taken gradients of other weights than it had."""
        return self._checks.changed(layers)

    def _check(
        self, begun: _Begun, places: Sequence[int], updates: dict[Layer, GradientUpdate]
    ) -> None:
        """Compare the weights of layers with what they were, without waiting for the answer.

        Args:
            begun: Their stack.
            places: Their places in it.
            updates: Their updates.
        """
        norms = begun.norms
        if len(places) < len(norms):
            norms = torch.stack([norms[place] for place in places])
        changes = LateNumbers(norms - _norms(list(updates.values())))
        layers = list(updates)
        self._checks.add(layers, partial(_changed, layers, changes))


def _changed(layers: Sequence[Layer], changes: LateNumbers) -> list[Layer]:
    """The layers of which the norms have changed."""
    found = []
    for layer, change in zip(layers, changes.read(), strict=True):
        if change != 0 and not math.isnan(change):  # NaN stays NaN
            found.append(layer)
    return found


def _columns(raw: RawPart, members: Sequence[PlainUpdate]) -> list[Tensor]:
    """The first entries of the neurons of a stack's layers, copied."""
    columns = [_column(members[place][2]) for place in raw.places]
    return list(torch.split(torch.cat(columns), [len(one) for one in columns]))


def _column(update: GradientUpdate) -> Tensor:
    """The first entry of each neuron of a layer."""
    first = update.entries.detach()
    while first.ndim > 2:
        first = first.select(-1, 0)
    return first.flatten()


def _begun(raw: RawPart, members: Sequence[PlainUpdate], device: torch.device) -> _Begun:
    """What to remember of gradients of some of these layers, which were just begun."""
    layers = []
    tokens = []
    updates = []
    for place in raw.places:
        layer, _, update = members[place]
        layers.append(layer)
        tokens.append(token_of(layer))
        updates.append(update)
    norms = _norms(updates)
    numbers = raw.numbers()
    return _Begun(raw, layers, tokens, norms, numbers, SideWork(device))


def _wait_for_messages(stacks: Sequence[_Begun]) -> None:
    """Wait for what other ranks send; all messages have come even if one of them tells of an error."""
    messages = [begun.messages for begun in stacks if begun.messages is not None]
    with ExitStack() as stack:
        for one in messages:
            stack.enter_context(one)
        for one in messages:
            one.wait()


def _abandon(stacks: Sequence[_Begun]) -> None:
    """Wait for messages of stacks that nobody takes."""
    for begun in stacks:
        if begun.messages is not None:
            begun.messages.abandon()


def _norms(updates: Sequence[GradientUpdate]) -> Tensor:
    """Norms (k,) of the weights of layers."""
    return torch.stack(torch._foreach_norm([update.entries.detach() for update in updates]))
