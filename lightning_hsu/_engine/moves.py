"""How far neurons have moved since their gradients were computed.

It is seen by some entries of each layer, and sometimes by each of its neurons (rows.py). On a GPU
that begins right after a step, for the next one, so that the host need not wait. Whether the
weights are still the same then is compared on the device, and read a step later.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype
from lightning_hsu._engine.delta import Known, Use
from lightning_hsu._engine.late import LateChecks, LateNumbers
from lightning_hsu._engine.layer import Layer, Token
from lightning_hsu._engine.rows import Rows

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Moves:
    """How far layers have moved: numbers that may be on their way to the host.

    Args:
        rows: Looks at neurons one by one.
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._begun: dict[str, _Look] = {}
        self._checks = LateChecks()
        self._then: dict[object, _Together] = {}  # on a GPU, where it spares a launch

    def begin(self, known: Sequence[Known], *, checks: bool = True) -> None:
        """Begin to look how far layers on GPUs have moved, for a step to come.

        Args:
            known: The layers.
            checks: Whether to compare their weights at the step, in case torch has missed a change.
        """
        for members in _by_kind(known):
            if reads_late(members[0][0].sample):
                look = self._look(members)
                look.checks = checks
                for use, _ in members:
                    self._begun[use.layer.name] = look

    def see(self, known: Sequence[Known]) -> None:
        """Note in the uses of layers how far these have moved."""
        if self._begun:
            known = self._see_begun(known)
        for members in _by_kind(known):
            self._look(members).tell(members)

    def _look(self, members: Sequence[Known]) -> _Look:
        """Look at layers of one device and dtype."""
        then = {use.layer.name: delta.sample for use, delta in members}
        sample = members[0][1].sample
        kind = sample.dtype, sample.device
        together = self._then.get(kind)
        if together is None or not together.is_of(then):
            together = _Together(then)
        if reads_late(sample):
            self._then[kind] = together
        return _Look(members, together.samples, self._rows)

    def _see_begun(self, known: Sequence[Known]) -> list[Known]:
        """The same of layers at which somebody has looked before; return the others."""
        looks: dict[_Look, list[Known]] = {}
        unseen = []
        for use, delta in known:
            look = self._begun.pop(use.layer.name, None)
            if look is not None and look.is_of(use):
                looks.setdefault(look, []).append((use, delta))
            else:
                unseen.append((use, delta))
        for look, members in looks.items():
            look.tell(members)
            if look.checks:
                check = _Check(look, [use for use, _ in members])
                self._checks.add(check.layers, check.changed)
        return unseen

    def note_kept(self, samples: Mapping[str, Tensor]) -> None:
        """Note the samples of gradients that were just kept, by layer; looks compare with them."""
        for together in self._then.values():
            together.replace(samples)

    def changed_unseen(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those whose weights were others at their last step than torch's counts said."""
        return self._checks.changed(layers)

    def drop(self, name: str | None = None) -> None:
        """Drop what was begun of a layer, or of all."""
        if name is None:
            self._begun = {}
            self._then = {}
            self._checks.drop()
        else:
            self._begun.pop(name, None)


class _Together:
    """Samples of kept gradients, also one after the other.

    Args:
        parts: The samples, of one device and dtype, by layer.
    """

    def __init__(self, parts: dict[str, Tensor]) -> None:
        self._parts = parts
        self.samples = self._one_after_the_other()

    def is_of(self, parts: dict[str, Tensor]) -> bool:
        """Whether it is made of these samples, in this order."""
        if list(parts) != list(self._parts):
            return False
        return all(map(operator.is_, parts.values(), self._parts.values()))

    def replace(self, parts: Mapping[str, Tensor]) -> None:
        """Put others in place of the samples of some layers, among others."""
        own = {}
        for name, part in parts.items():
            before = self._parts.get(name)
            if before is not None and (part.dtype, part.device) == (before.dtype, before.device):
                own[name] = part
        if own:
            self._parts = self._parts | own
            self.samples = self._one_after_the_other()

    def _one_after_the_other(self) -> Tensor:
        """All entries, in float32 or wider."""
        together = torch.cat(list(self._parts.values()))
        return together.to(working_dtype(together.dtype))


class _Look:
    """How far some layers of one device and dtype have moved.

    Args:
        members: The layers.
        then: The samples of their kept gradients, one after the other, in float32 or wider.
        rows: Looks at neurons one by one.

    Attributes:
        places: The places of the layers.
        samples: Entries of all layers, one after the other.
        sizes: How many of each.
        checks: Whether to compare them with those at the step.
    """

    def __init__(self, members: Sequence[Known], then: Tensor, rows: Rows) -> None:
        self.places: dict[Layer, int] = {}
        self.checks = True
        self._row_places: dict[Layer, int] = {}
        self._tokens: list[Token | None] = []
        now = []
        asked: list[Known] = []
        for place, (use, delta) in enumerate(members):
            self.places[use.layer] = place
            self._tokens.append(use.token)
            now.append(use.sample)
            if use.looks_at_rows:
                self._row_places[use.layer] = len(members) + len(asked)
                asked.append((use, delta))
        self.sizes = [len(sample) for sample in now]
        self.samples = torch.cat(now)
        moves = self.samples.to(then.dtype) - then
        numbers = list(torch._foreach_norm(list(torch.split(moves, self.sizes))))
        if asked:
            numbers += rows.look(asked)
        self._numbers = LateNumbers(torch.stack(numbers))

    def is_of(self, use: Use) -> bool:
        """Whether it is of a layer's weights as they are now, as far as torch counts changes."""
        place = self.places.get(use.layer)
        if place is None or use.token is None or self._tokens[place] != use.token:
            return False
        return use.looks_at_rows == (use.layer in self._row_places)

    def tell(self, members: Sequence[Known]) -> None:
        """Note in the uses of some of these layers how far they have moved."""
        numbers = self._numbers.read()
        for use, delta in members:
            use.moved = delta.relative(numbers[self.places[use.layer]])
            if use.looks_at_rows:
                use.changed = numbers[self._row_places[use.layer]]

    def samples_of(self, uses: Sequence[Use]) -> Tensor:
        """Entries of some of these layers, one after the other."""
        if len(uses) == len(self.sizes):
            return self.samples
        parts = torch.split(self.samples, self.sizes)
        return torch.cat([parts[self.places[use.layer]] for use in uses])


class _Check:
    """Whether layers have at a step the weights that were looked at before it.

    Args:
        look: What was looked at.
        uses: Some of its layers, at the step.
    """

    def __init__(self, look: _Look, uses: Sequence[Use]) -> None:
        uses = sorted(uses, key=lambda use: look.places[use.layer])
        self.layers = [use.layer for use in uses]
        samples = [use.sample for use in uses]
        self._sizes = [len(sample) for sample in samples]
        self._differ = _bits(look.samples_of(uses)) != _bits(torch.cat(samples))
        self._any = LateNumbers(self._differ.any().view(1))

    def changed(self) -> list[Layer]:
        """The layers whose weights are others."""
        if not self._any.read()[0]:
            return []
        differ = torch.split(self._differ, self._sizes)
        pairs = zip(self.layers, differ, strict=True)
        return [layer for layer, part in pairs if bool(part.any())]


def reads_late(x: Tensor) -> bool:
    """Whether numbers of a tensor are begun early and read late: those of a GPU."""
    return x.is_cuda


def _by_kind(known: Sequence[Known]) -> list[list[Known]]:
    """Layers grouped by device and dtype."""
    found: dict[object, list[Known]] = {}
    for one in known:
        sample = one[0].sample
        found.setdefault((sample.dtype, sample.device), []).append(one)
    return list(found.values())


def _bits(x: Tensor) -> Tensor:
    """The entries as whole numbers, of which NaN equals itself."""
    return x.view(_BITS[x.element_size()])
