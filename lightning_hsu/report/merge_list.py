"""What could be merged in a network: the data, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lightning_hsu._monitor.fold import NO_BREAK, fold_names
from lightning_hsu._monitor.render import Line, View, printable
from lightning_hsu._monitor.text import counted, layer_named, number

_LISTED = 12  # neurons of a merge that are printed
_PAIRS = 20  # of layers whose sums are printed


@dataclass(frozen=True)
class Merge:
    """Neurons of a layer that could be merged into one.

    The recipe: add ``factors[j]`` times the column of neuron ``dropped[j]`` in the next layer to that
    of neuron ``kept``, and drop the row ``dropped[j]`` (of a batch norm right after it, too) and that
    column. Where a convolution feeds a Linear layer, a column is a block of columns. Of weights stored
    as (inputs, outputs), such as W_enc and W_dec of a sparse autoencoder, rows are columns and columns
    are rows.

    Args:
        layer: Name of the layer.
        following: Name of the next layer.
        kept: Index of the neuron that stays.
        dropped: Indices of those that are merged into it.
        factors: What their outgoing weights are multiplied by.
        slope: No output of the next layer changes by more than ``slope * norm + offset``, where norm
            is that of the layer's input: of a vector, or of the largest patch of a convolution.
        offset: What biases add.
        share: That limit over what the next layer's weights can make of the layer at most, both for
            inputs of norm 1.
        saved: Parameters that are no longer needed.
        norm: Name of the batch norm whose rows are dropped, too, in eval mode; None without one.
        condition: What must hold, where it is read from names; "" if the model itself was read.
        activation: What lies between the layers.
        prelu: Name of the slopes of a PReLU with one for each neuron, of which those of ``dropped``
            are dropped, too; None without one.
    """

    layer: str
    following: str
    kept: int
    dropped: tuple[int, ...]
    factors: tuple[float, ...]
    slope: float
    offset: float
    share: float
    saved: int
    norm: str | None
    condition: str
    activation: str
    prelu: str | None = None


@dataclass(frozen=True)
class Together:
    """All merges of a layer with the next one, done together.

    No neuron is in two of them, so what they change adds up.

    Args:
        layer: Name of the layer.
        following: Name of the next layer.
        count: How many merges they are.
        dropped: How many neurons they drop.
        saved: Parameters that are no longer needed.
        slope: As of a :class:`Merge`, of the outputs when all merges are done.
        offset: Likewise.
        share: Likewise.
    """

    layer: str
    following: str
    count: int
    dropped: int
    saved: int
    slope: float
    offset: float
    share: float


class NotMerged(NamedTuple):
    """A layer with near-duplicates of which none can be merged.

    Args:
        layer: Name of the layer.
        reason: Why.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class Merges:
    """What could be merged in a network.

    Args:
        found: The merges with the smallest share first, at most so many as were asked for.
        count: How many there are in all, with at most 20 of a group.
        pairs: Layers that were looked at, each with the next one.
        how: How it is known which layer follows which.
        not_followed: Layers that have near-duplicates, but of which no following layer is known, each
            with the reason.
        way_out: What to do about these, in words; "" if there is nothing.
        not_merged: Layers that have near-duplicates and a following layer, but of which none can be
            merged, each with the reason.
        together: What all merges of a layer do together, for each pair of layers that has some;
            all that were found, not only those that are listed.
    """

    found: tuple[Merge, ...]
    count: int
    pairs: tuple[tuple[str, str], ...]
    how: str
    not_followed: tuple[NotMerged, ...] = ()
    way_out: str = ""
    not_merged: tuple[NotMerged, ...] = ()
    together: tuple[Together, ...] = ()

    def __str__(self) -> str:
        """A line for each merge, and what the numbers mean, in 80 columns."""
        return self.text()

    def text(self, width: int = 80) -> str:
        """The same in so many columns."""
        return _view(self).text(width)

    def _repr_html_(self) -> str:
        """The same for a notebook."""
        return _view(self).html().replace(NO_BREAK, "&nbsp;")

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, numbers and strings."""
        return {
            "found": [asdict(merge) for merge in self.found],
            "count": self.count,
            "pairs": [list(pair) for pair in self.pairs],
            "how": self.how,
            "together": [asdict(one) for one in self.together],
            "not_followed": [one._asdict() for one in self.not_followed],
            "not_merged": [one._asdict() for one in self.not_merged],
        }


def _view(merges: Merges) -> View:
    """A line for each merge and for all of a pair of layers, and what the numbers mean."""
    if not merges.pairs:
        lines = [Line("merge: no pair of layers is known to follow each other")]
    else:
        pairs = counted(len(merges.pairs), "pair")
        lines = [Line(f"merge: {pairs} of layers that follow each other; {merges.how}")]
        if not merges.found:
            lines.append(Line("no near-duplicate neurons that could be merged", indent=2))
    for merge in merges.found:
        lines.append(Line(_line(merge), indent=2, hanging=6))
    if merges.count > len(merges.found):
        lines.append(Line(f"and {merges.count - len(merges.found):,} more", indent=2))
    lines += _sums(merges)
    if merges.found:
        lines += _explained(merges.found)
    lines += _without(merges)
    return View([], [], [], "", 0, lines)


def _line(merge: Merge) -> str:
    """A merge in a line."""
    words = []
    for neuron, factor in zip(merge.dropped[:_LISTED], merge.factors, strict=False):
        words.append(f"{neuron}{NO_BREAK}(times{NO_BREAK}{number(factor, 3)})")
    if len(merge.dropped) > _LISTED:
        words.append(f"{len(merge.dropped) - _LISTED:,} more")
    between = merge.condition or f"{merge.activation} between"
    if merge.norm is not None:
        between = f"batch norm {printable(merge.norm)} in eval mode, {between}"
    return (
        f"{_named(merge.layer)}: keep {merge.kept} for {', '.join(words)}; {_change(merge)}; "
        f"{between}; saves {merge.saved:,} parameters"
    )


def _change(change: Merge | Together) -> str:
    """How much the outputs of the next layer change, in words."""
    parts = []
    if change.slope > 0:
        parts.append(f"{change.slope:.3g} * |input|")
    if change.offset > 0:
        parts.append(f"{change.offset:.3g}")
    if not parts:
        return f"outputs of {_named(change.following)} stay the same"
    limit = " + ".join(parts).replace(" ", NO_BREAK)
    return (
        f"outputs of {_named(change.following)} change by at most {limit}, "
        f"{100 * change.share:.2g}{NO_BREAK}% of what its weights allow"
    )


def _sums(merges: Merges) -> list[Line]:
    """A line for each pair of layers on all merges there, unless it is one that is listed."""
    listed = {merge.layer for merge in merges.found}
    several = []
    for one in merges.together:
        if one.count > 1 or one.layer not in listed:
            several.append(one)
    lines = []
    for one in several[:_PAIRS]:
        dropped = counted(one.dropped, "neuron")
        drop, save = ("drop", "save") if one.count > 1 else ("drops", "saves")
        line = (
            f"together in {_named(one.layer)}: {counted(one.count, 'merge')} {drop} {dropped} and "
            f"{save} {one.saved:,} parameters; {_change(one)}"
        )
        lines.append(Line(line, indent=2, hanging=6))
    if len(several) > _PAIRS:
        lines.append(Line(f"and in {len(several) - _PAIRS:,} more layers", indent=2))
    return lines


def _explained(merges: Sequence[Merge]) -> list[Line]:
    """What the numbers of merges mean."""
    dropped = ["column 2 there"]
    if any(merge.norm is not None for merge in merges):
        dropped.append("number 2 of a batch norm between")
    if any(merge.prelu is not None for merge in merges):
        dropped.append("slope 2 of a PReLU between")
    what = (
        '"keep 1 for 2 (times c)": in the next layer add c times column 2 to column 1, then drop '
        f"{', '.join(dropped)} and row 2 here"
    )
    if any("W_enc" in merge.layer or "W_dec" in merge.following for merge in merges):
        what += "; of W_enc and W_dec that are stored transposed, rows are columns"
    change = (
        "|input| is the norm of what the layer is given, of a convolution that of the largest "
        "patch; no output of the next layer changes by more, in eval mode; the percentage is that "
        "limit over what the next layer's weights can make of this layer at most, both where "
        "|input| is 1"
    )
    lines = [Line(what), Line(change)]
    if len({merge.layer for merge in merges}) > 1:
        lines.append(Line("each layer is counted by itself, as if only its neurons were merged"))
    return lines


def _without(merges: Merges) -> list[Line]:
    """Which layers have near-duplicates of which none can be merged, and why."""
    by_reason: dict[str, list[str]] = {}
    for one in (*merges.not_merged, *merges.not_followed):
        by_reason.setdefault(printable(one.reason), []).append(_named(one.layer))
    if not by_reason:
        return []
    lines = [Line("near-duplicates that are not merged:")]
    for reason, names in by_reason.items():
        folded = names[0] if len(names) == 1 else fold_names(names)
        lines.append(Line(f"{folded}: {reason}", indent=2, hanging=6))
    if merges.not_followed and merges.way_out:
        lines.append(Line(merges.way_out))
    return lines


def _named(name: str) -> str:
    """The name of a layer in a sentence, without control characters."""
    return layer_named(printable(name))
