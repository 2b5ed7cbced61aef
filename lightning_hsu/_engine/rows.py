"""Whether single neurons of a layer are others than before, which a few of its entries do not show.

A new, pruned or swapped neuron changes a large layer little on average, and its gradient wholly. Of
each neuron a *sketch* is kept: the products of its eight parts with random signs, whose change is
about as long as that of the neuron. One pass over the weights finds the neuron that has changed
most. That takes 2.5 % of the time of a gradient for layers of 256 x 256 and 128 x 1152, 8 % for
64 x 64, where it is 17 us, and 0.2 % for 768 x 3072: little, but several times as long as it takes to add
a kept gradient. So it is not done at every step, but

- at a step at which the weights were written to more often than between other steps, as torch counts
  it, or lie in another memory: something other than the optimizer has changed them;
- at ages 4, 8, 16 and so on, for what torch does not count, and for what optimizers do in a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype
from lightning_hsu._engine.delta import SAMPLE, Delta, Use
from lightning_hsu._engine.layer import Token

_PARTS = 8  # in all of them a new neuron looks like the old one once in 1e5 times
_FAR = 0.25  # of the typical norm of a neuron; within a tolerance of 0.05 layers move by 0.03
_TIMES = 6.0  # as far as the layer has moved; in a training some neurons moved 4.8 times as far
FIRST_LOOK = 4
"""The age, a power of two, from which neurons are looked at one by one now and then."""


class Rows:
    """Sees when single neurons have changed."""

    def __init__(self) -> None:
        self._signs: dict[object, Tensor] = {}
        self._tokens: dict[str, Token] = {}
        self._writes: dict[str, int] = {}

    def sketch(self, x: Tensor) -> Tensor | None:
        """What is kept of neurons x (groups, n, d): shape (groups, n, 8), in bfloat16.

        None for small layers, of which all entries are seen.
        """
        if x.numel() <= SAMPLE:
            return None
        return self._products(x).bfloat16()

    def is_asked(self, use: Use, delta: Delta) -> bool:
        """Whether it is time to look at a layer's neurons one by one."""
        if delta.sketch is None or delta.age == 0:
            return False
        if delta.age >= FIRST_LOOK and delta.age & (delta.age - 1) == 0:
            return True
        # Ranks may write at other times, as when one alone evaluates, but must look alike.
        return use.layer.target.placement.is_alone and not self._is_usual(use)

    def largest_change(self, use: Use, delta: Delta) -> Tensor:
        """Length of the largest change of a neuron over the typical norm of one; a 0-d tensor."""
        assert delta.sketch is not None
        before = delta.sketch.to(working_dtype(use.x.dtype))
        change = self._products(use.x).to(before.dtype) - before
        lengths = torch.linalg.vector_norm(change, dim=-1).nan_to_num_(nan=0.0)
        typical = torch.linalg.vector_norm(before) / lengths.numel() ** 0.5
        largest: Tensor = lengths.amax() / typical
        return largest

    def note(self, use: Use) -> None:
        """Note that a step has seen the weights of a layer as they are now."""
        name, token = use.layer.name, use.token
        before = self._tokens.pop(name, None)
        if token is None:
            return
        if before is not None:
            self._writes[name] = _writes(before, token)
        self._tokens[name] = token

    def drop(self) -> None:
        """Drop what is known of writes."""
        self._signs = {}
        self._tokens = {}
        self._writes = {}

    def _is_usual(self, use: Use) -> bool:
        """Whether the weights were written to as often as before the last step."""
        name, token = use.layer.name, use.token
        before = self._tokens.get(name)
        if before is None or token is None or name not in self._writes:
            return True
        return _writes(before, token) == self._writes[name]

    def _products(self, x: Tensor) -> Tensor:
        """The sums of the parts of neurons x (groups, n, d) under random signs: (groups, n, 8)."""
        parts = min(_PARTS, x.shape[-1])
        entries = x.shape[-1] // parts
        key = (entries, x.dtype, x.device)
        if key not in self._signs:
            generator = torch.Generator().manual_seed(0)  # the same in all processes
            bits = torch.randint(2, (entries,), generator=generator, device="cpu")
            self._signs[key] = (2 * bits - 1).to(x.device, x.dtype, non_blocking=True)
        parted = x[..., : parts * entries].reshape(-1, entries)
        return torch.mv(parted, self._signs[key]).view(*x.shape[:-1], parts)


def is_another(changed: float, moved: float) -> bool:
    """Whether a neuron has changed so much more than its layer that it is another one.

    Args:
        changed: Its change over the typical norm of a neuron.
        moved: Relative change of the layer.
    """
    return changed > max(_FAR, _TIMES * moved)


def _writes(before: Token, now: Token) -> int:
    """How often parameters were written to between two tokens; -1 if they lie elsewhere now."""
    writes = 0
    for (known, memory, version), (same, same_memory, later) in zip(before, now, strict=False):
        if known != same or memory != same_memory:
            return -1
        writes += later - version
    return writes
