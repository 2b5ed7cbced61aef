"""Near pairs of a batch of layers, found and redone in float64 without host-device synchronisation.

As many pairs as a fixed capacity are listed; where there are fewer the list ends with the spare
entry, which stands for a pair of a spare row with itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_hsu._core.kernel import PairTerm
from lightning_hsu._core.layout import Layout, Piece

_LONGEST_PUSH = 1e30
"""Largest entry of what a near pair adds, so that sums of them stay in range."""

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


class ListedPairs(NamedTuple):
    """The near pairs of a piece.

    Args:
        at: Their places (k,) among its panels; the spare entry after the last.
        rows: Their rows in the batch, (2, k).
        groups: Their groups in the batch (k,); the number of groups for the spare entry.
        kinds: The kernels of the piece, each with a mask (k,) of its pairs; the first has none.
        once: Whether the pair counts here, bool (k,): what is beside a diagonal is listed twice.
        squares: Squared chords to the other neuron, and to its mirror image, (2, k) in float64.
        difference: Difference and sum of the unit rows, (2, k, d) in float64.
    """

    at: Tensor
    rows: Tensor
    groups: Tensor
    kinds: list[tuple[int, Tensor | None]]
    once: Tensor
    squares: Tensor
    difference: Tensor


def first_places(mask: Tensor, count: int) -> Tensor:
    """The first ``count`` places at which a mask (n,) is true, (count,); n - 1 where there are fewer.

    The last entry of the mask is false.
    """
    last = len(mask) - 1
    # On a GPU this function needs torch 2.7.
    if _VERSION >= (2, 7) or not mask.is_cuda:
        return torch.nonzero_static(mask, size=count, fill_value=last).view(-1)
    numbers = torch.arange(1, count + 1, device=mask.device, dtype=torch.int32)
    so_far = mask.cumsum(0, dtype=torch.int32)
    return torch.searchsorted(so_far, numbers).clamp_max_(last)


def listed_pairs(
    near: Tensor, w: Tensor, norm: Tensor, layout: Layout, piece: Piece
) -> ListedPairs:
    """List the near pairs of a piece, and measure them in float64.

    Args:
        near: Mask of the near ones among the panels of the piece.
        w: The neurons as one flat tensor, followed by as many entries as the longest has.
        norm: Their norms, of all rows, in float64.
        layout: Where they lie.
        piece: The piece.
    """
    at = first_places(near, layout.capacity)
    group = torch.searchsorted(piece.starts, at, right=True)
    mark = piece.marks.index_select(0, group)
    columns = mark.select(1, 2)
    kinds: list[tuple[int, Tensor | None]] = []
    for kind, _, _ in piece.stretches:
        kinds.append((kind, mark.select(1, 3) == kind if kinds else None))
    rows = torch.empty(2, len(at), dtype=torch.int64, device=w.device)
    torch.div(at, columns, rounding_mode="floor", out=rows[0])
    torch.remainder(at, columns, out=rows[1])
    rows += mark.narrow(1, 0, 2).mT
    once = rows[0] < rows[1]
    x = _neurons(w, rows.view(-1), layout).view(2, len(at), -1).double()
    x /= norm[rows][..., None]
    difference = torch.mm(layout.signs, x.view(2, -1)).view_as(x)
    squares = torch.linalg.vector_norm(difference, dim=2).square_()
    return ListedPairs(at, rows, mark.select(1, 4), kinds, once, squares, difference)


def _neurons(w: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Some rows (k, d) of the flat neurons, filled with zeros up to the largest dimension."""
    if len(layout.widths) == 1:
        return w.narrow(0, 0, layout.entries).view(layout.rows, -1).index_select(0, rows)
    entry, d = layout.reach.index_select(0, rows).unbind(1)
    places = layout.columns + entry[:, None]
    beyond = layout.columns >= d[:, None]
    return w[places].masked_fill_(beyond, 0.0)


def pulls_of(
    pairs: ListedPairs, terms: Sequence[PairTerm], layout: Layout, *, with_energy: bool
) -> tuple[Tensor, Tensor | None]:
    """How two neurons of a pair pull each other, and the energies of the pairs.

    In the tangent plane of either unit row their sum is minus their difference. So all of the pull
    is along the shorter one of them, which has the smaller part along the row itself.

    Returns:
        Pulls (2, k) along the difference and along the sum, and energies (k,), which are 0 for
        pairs that do not count here and anything for the spare entry; None without
        ``with_energy``.
    """
    mirrored = pairs.squares.flip(0)
    count = 2 if with_energy else 1
    last: PairTerm | None = None
    found = numbers = None
    for kind, mask in pairs.kinds:
        term = terms[kind]
        if numbers is None or last is None or not term.has_kernel_of(last):
            numbers = _softened(term, pairs.squares, mirrored, with_energy)
            last = term
        sums = layout.apart[kind][: count + 1, : 2 * count]
        own = torch.mm(sums, numbers)
        found = own if found is None or mask is None else torch.where(mask, own, found)
    assert found is not None
    found *= pairs.once
    pulls = found[:2].mul_(pairs.squares < mirrored)
    return pulls, found[2] if with_energy else None


def _softened(term: PairTerm, squares: Tensor, mirrored: Tensor, with_energy: bool) -> Tensor:
    """Slopes in both squared chords (2, k), and with energies the values at both, (4, k)."""
    if with_energy:
        return term.softened_both(squares, mirrored).flatten(0, 1)
    return term.softened_slope(squares, mirrored)


def add_pushes(grad: Tensor, pairs: ListedPairs, pulls: Tensor, layout: Layout) -> None:
    """Add the listed pairs to the sums of slopes times unit rows.

    Args:
        grad: The sums, as one flat tensor.
        pairs: The pairs; their differences are overwritten.
        pulls: From :func:`pulls_of`.
        layout: Where the rows lie.
    """
    pushes = pairs.difference.mul_(pulls[..., None])
    pushes = torch.mm(layout.signs_back, pushes.view(2, -1)).view_as(pushes)
    pushes = pushes.clamp_(-_LONGEST_PUSH, _LONGEST_PUSH).flatten(0, 1).to(grad.dtype)
    rows = pairs.rows.view(-1)
    places = [rows]
    if len(layout.widths) > 1:
        places = list(layout.places[:, rows])
    for width, place in zip(layout.widths, places, strict=True):
        own = grad.narrow(0, width.entry - width.d, (width.rows + 1) * width.d)
        # index_put_ adds in a fixed order, unlike index_add_.
        own.view(-1, width.d).index_put_((place,), pushes[:, : width.d], accumulate=True)
