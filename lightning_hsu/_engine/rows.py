"""Whether single neurons of a layer are others than before, which a few of its entries do not show.

A new, pruned or swapped neuron changes a large layer little on average, and its gradient wholly. Of
each neuron a *sketch* is kept: the products of its eight or so parts with random signs, whose change
is about as long as that of the neuron, over its norm: a short neuron has a large gradient. One pass
over the weights finds the neuron that has changed most. That takes 3 % of the time of a gradient for
layers of 256 x 256 and 128 x 1152, 9 % for 64 x 64 (19 us), and 0.1 % for 768 x 3072: little, but
several times as long as it takes to add a kept gradient. So it is not done at every step, but

- at a step at which the weights were written to more often than between other steps, as torch counts
  it, or lie in another memory: something other than the optimizer has changed them;
- when it is the gradient's turn (turns.py), for what torch does not count, and for what optimizers
  do in a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hsu._core import working_dtype
from lightning_hsu._core.tables import upload
from lightning_hsu._engine.delta import SAMPLE, Delta, Known, Sketch, Use
from lightning_hsu._engine.layer import Token

_PARTS = 8  # in all of them a new neuron looks like the old one once in 1e5 times
_OTHER_PARTS = (9, 7, 10, 6, 11, 12)  # where they divide a dimension that 8 does not
_FAR = 0.25  # of the neuron's norm; within a tolerance of 0.05 layers move by 0.03
_TIMES = 6.0  # as far as the layer has moved; in a training some neurons moved 4.8 times as far
_SKETCHED_FROM = 4  # steps that a gradient is used for; a shorter time needs no look


class Rows:
    """Sees when single neurons have changed."""

    def __init__(self) -> None:
        self._signs: dict[object, Tensor] = {}
        self._seen: dict[str, tuple[Token | None, int | None]] = {}

    def sketch(self, x: Tensor, interval: int) -> Sketch | None:
        """What is kept of neurons x (groups, n, d).

        None for small layers, of which all entries are seen, and where it is not worth it.

        Args:
            x: The neurons.
            interval: Steps for which their gradient is used.
        """
        if x.numel() <= SAMPLE or interval < _SKETCHED_FROM:
            return None
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=working_dtype(x.dtype)).view(-1, 1)
        inverse = norm.clamp_min_(torch.finfo(norm.dtype).tiny).reciprocal_()
        return Sketch((self._products(x) * inverse).bfloat16(), inverse.bfloat16())

    def see(self, use: Use, *, is_step: bool) -> None:
        """Note whether the weights of a layer were written to more or less often than usual.

        Args:
            use: The layer.
            is_step: Whether a step sees them, after which the next writes are counted.
        """
        before, usual = self._seen.get(use.layer.name, (None, None))
        writes = None
        if before is not None and use.token is not None:
            writes = _writes(before, use.token)
            use.is_written = usual is not None and writes != usual
        if is_step:
            self._seen[use.layer.name] = use.token, writes

    def is_asked(self, use: Use, delta: Delta) -> bool:
        """Whether a layer's neurons must be looked at one by one, for somebody has written to them."""
        if delta.sketch is None or delta.age == 0:
            return False
        # Ranks may write at other times, as when one alone evaluates, but must look alike.
        return use.is_written and use.layer.target.placement.is_alone

    def look(self, known: Sequence[Known]) -> list[Tensor]:
        """Begin to look at the neurons of layers of one device and dtype.

        Returns:
            0-d tensors: the change of the neuron of each layer that has changed most, over its norm.
        """
        found = []
        for use, delta in known:
            assert delta.sketch is not None
            products, inverse = delta.sketch
            change = torch.addcmul(products, self._products(use.x), inverse, value=-1.0)
            lengths = torch.linalg.vector_norm(change, dim=-1)
            if lengths.device.type == "cpu":
                lengths.nan_to_num_(0.0)  # of a neuron that is NaN
            found.append(lengths.amax())
        return found

    def drop(self) -> None:
        """Drop what is known of writes, and the random signs, which the next sketch makes again."""
        self._signs = {}
        self._seen = {}

    def _products(self, x: Tensor) -> Tensor:
        """The sums of the parts of neurons x (groups, n, d) under random signs: (groups * n, parts)."""
        d = x.shape[-1]
        parts = _PARTS
        for other in _OTHER_PARTS:
            if d % parts != 0 and d % other == 0:
                parts = other
        entries = max(1, d // parts)
        key = (entries, x.dtype, x.device)
        if key not in self._signs:
            generator = torch.Generator().manual_seed(0)  # the same in all processes
            bits = torch.randint(2, (entries,), generator=generator, device="cpu")
            self._signs[key] = upload((2 * bits - 1).to(x.dtype), x.device)
        if d < parts:
            x = torch.nn.functional.pad(x, (0, parts - d))
        if d > parts * entries:
            x = x[..., : parts * entries]
        return torch.mv(x.reshape(-1, entries), self._signs[key]).view(-1, parts)


def is_another(changed: float, moved: float) -> bool:
    """Whether a neuron has changed so much more than its layer that it is another one.

    Args:
        changed: Its change over its norm.
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
