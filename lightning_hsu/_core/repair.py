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
        kind: Their kernels, (k,).
        once: Whether the pair counts here, bool (k,): what is beside a diagonal is listed twice.
        squares: Squared chords to the other neuron, and to its mirror image, (2, k) in float64.
        difference: Difference and sum of the unit rows, (2, k, d) in float64.
    """

    at: Tensor
    rows: Tensor
    kind: Tensor
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
    columns, kind = mark.select(1, 2), mark.select(1, 3)
    rows = torch.empty(2, len(at), dtype=torch.int64, device=w.device)
    torch.div(at, columns, rounding_mode="floor", out=rows[0])
    torch.remainder(at, columns, out=rows[1])
    rows += mark.narrow(1, 0, 2).mT
    once = rows[0] < rows[1]
    x = _neurons(w, rows.view(-1), layout).view(2, len(at), -1).double()
    x /= norm[rows][..., None]
    difference = torch.mm(layout.signs, x.view(2, -1)).view_as(x)
    squares = torch.linalg.vector_norm(difference, dim=2).square_()
    return ListedPairs(at, rows, kind, once, squares, difference)


def _neurons(w: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Some rows (k, d) of the flat neurons, filled with zeros up to the largest dimension."""
    if len(layout.widths) == 1:
        return w.narrow(0, 0, layout.entries).view(layout.rows, -1).index_select(0, rows)
    entry, d = layout.reach.index_select(0, rows).unbind(1)
    places = layout.columns + entry[:, None]
    beyond = layout.columns >= d[:, None]
    return w[places].masked_fill_(beyond, 0.0)


def pair_energies(pairs: ListedPairs, terms: Sequence[PairTerm]) -> Tensor:
    """Energies (k,) of the listed pairs, 0 for those that do not count here."""
    energies = torch.zeros_like(pairs.squares[0])
    for kind, term in enumerate(terms):
        value = term.split(pairs.squares[0], pairs.squares[1])[0]
        energies = torch.where(pairs.kind == kind, value, energies)
    return torch.where(pairs.once, energies, 0.0)  # those of the spare entry may be anything


def _pulls(pairs: ListedPairs, terms: Sequence[PairTerm], layout: Layout) -> Tensor:
    """Pulls (2, k) along the difference of two unit rows, and along their sum.

    In the tangent plane of either row the sum is minus the difference. So all of the pull is along
    the shorter one of them, which has the smaller part along the row itself, and none along the other.
    """
    mirrored = pairs.squares.flip(0)
    pulls = None
    for kind, term in enumerate(terms):
        own = torch.mm(layout.apart[kind], term.softened_slope(pairs.squares, mirrored))
        pulls = own if pulls is None else torch.where(pairs.kind == kind, own, pulls)
    assert pulls is not None
    return pulls.mul_(pairs.squares < mirrored)


def add_pushes(grad: Tensor, pairs: ListedPairs, terms: Sequence[PairTerm], layout: Layout) -> None:
    """Add the listed pairs to the sums of slopes times unit rows.

    Args:
        grad: The sums, as one flat tensor.
        pairs: The pairs; their differences are overwritten.
        terms: The kernels.
        layout: Where the rows lie.
    """
    pulls = _pulls(pairs, terms, layout).mul_(pairs.once)
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
