"""Which near-duplicate neurons could be merged into one, and how much the next layer would notice.

Neuron j with weights w_j, b_j gives h_j = f(w_j x + b_j). If f(c z) = c f(z) for c >= 0, as of ReLU,
h_j is nearly c h_i where w_j is nearly c w_i. So neuron j can be dropped if c times its column in the
next layer is added to that of neuron i. With outgoing weights v_kj, output k then changes by at most

    sum over j of |v_kj| L (|w_j - c w_i| |x| + |b_j - c b_i|)

where L is the largest slope of f. The bound is linear in the norm |x| of the layer's input; for a
convolution |v_kj| is the sum over the places of the kernel, and |x| the norm of the largest patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_hsu._monitor.fold import NO_BREAK, fold_names
from lightning_hsu._monitor.render import Line, wrapped
from lightning_hsu._monitor.text import counted, layer_named, number
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu.report.activations import Activation
from lightning_hsu.report.data import LayerReport
from lightning_hsu.report.following import Step, Steps

_CANDIDATES = 16  # neurons of a group that may be the one that is kept, evenly spaced
_SAME_LENGTH = 0.1  # lengths may differ by so much where the activation is not homogeneous
_PER_GROUP = 20  # merges of a group, which may be a long chain
_LISTED = 12  # neurons of a merge that are printed


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
        slope: No output of the next layer changes by more than ``slope * |x| + offset`` where x is
            the layer's input: a vector, or the largest patch of a convolution.
        offset: What biases add.
        share: That bound at ``|x| = 1`` over the same bound on the outputs themselves.
        saved: Parameters that are no longer needed.
        norm: Name of the batch norm whose rows are dropped, too, in eval mode; None without one.
        condition: What must hold, where it is read from names; "" if the model itself was read.
        activation: What lies between the layers.
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


@dataclass(frozen=True)
class Merges:
    """What could be merged in a network.

    Args:
        found: The merges with the smallest share first, at most so many as were asked for.
        count: How many there are in all, with at most 20 of a group.
        pairs: Layers that were looked at, each with the next one.
        how: How it is known which layer follows which.
        not_followed: Layers that have near-duplicates, but of which no following layer is known.
        way_out: What to do about these, in words; "" if there is nothing.
    """

    found: tuple[Merge, ...]
    count: int
    pairs: tuple[tuple[str, str], ...]
    how: str
    not_followed: tuple[str, ...] = ()
    way_out: str = ""

    def __str__(self) -> str:
        """A line for each merge, and what the numbers mean."""
        return "\n".join(merge_lines(self))

    def to_dict(self) -> dict[str, Any]:
        """All of it as lists, numbers and strings."""
        return {
            "found": [asdict(merge) for merge in self.found],
            "count": self.count,
            "pairs": [list(pair) for pair in self.pairs],
            "how": self.how,
            "not_followed": list(self.not_followed),
        }


@dataclass(frozen=True)
class _Joint:
    """A layer and what the next one makes of it, in float64.

    Args:
        weight: Its neurons (n, d), a batch norm folded in.
        bias: Its biases (n,), likewise.
        outgoing: Absolute weights of the next layer, summed over places, (n2, n).
        parameters: How many parameters a neuron has here and in the next layer.
        activation: What lies between.
        odd: Whether opposite neurons can be merged.
    """

    weight: Tensor
    bias: Tensor
    outgoing: Tensor
    parameters: int
    activation: Activation
    odd: bool


def merges_of(
    steps: Steps,
    targets: Sequence[NeuronSet],
    layers: Sequence[LayerReport],
    similar_above: float,
    most: int,
) -> Merges:
    """Find what could be merged.

    Args:
        steps: Which layer follows which.
        targets: The neurons of all layers that a report is on.
        layers: The report on them.
        similar_above: Cosine from which on a neuron may be merged into another.
        most: How many merges to list.
    """
    places = {target.name: i for i, target in enumerate(targets)}
    found: list[Merge] = []
    pairs = []
    for step in steps.steps:
        if step.layer not in places:
            continue
        place = places[step.layer]
        if not _plain(targets[place], step.stored().shape(steps.shapes)):
            continue
        pairs.append((step.layer, step.following))
        groups = layers[place].groups
        if not groups:
            continue
        rows = targets[place].neurons()[0].detach().cpu()
        if not torch.equal(rows.double().nan_to_num(), _rows(step, steps).double().nan_to_num()):
            pairs.pop()  # its neurons are not the rows of its weight
            continue
        joint = _joint(step, steps)
        if not bool(torch.isfinite(joint.outgoing).all()):
            continue
        for group in groups:
            found += _merges(step, joint, group.neurons, similar_above)
    found.sort(key=lambda merge: merge.share)
    followed = {layer for layer, _ in pairs}
    others = []
    for layer in layers:
        if layer.groups and layer.name not in followed:
            others.append(layer.name)
    return Merges(
        tuple(found[:most]), len(found), tuple(pairs), steps.how, tuple(others), steps.way_out
    )


def _plain(target: NeuronSet, shape: torch.Size) -> bool:
    """Whether a layer's neurons are the rows of its weight."""
    return target.shape == (1, shape[0], shape[1:].numel())


def _rows(step: Step, steps: Steps) -> Tensor:
    """The weight of a layer (n, d)."""
    return step.stored().read(steps.tensor).flatten(1)


def _joint(step: Step, steps: Steps) -> _Joint:
    """A layer and the next one in float64."""
    weight = _rows(step, steps).double()
    bias = steps.bias(step.name_of_bias(), len(weight)).cpu()
    parameters = weight.shape[1] + (step.name_of_bias() in steps.shapes)
    if step.norm is not None:
        norm = steps.norm(step.norm)
        scale = norm.scale.cpu()
        bias = scale * (bias - norm.mean.cpu()) + norm.bias.cpu()
        weight = scale[:, None] * weight
        parameters += norm.affine
    following = step.stored_following().read(steps.tensor)
    blocks = following.flatten(1).double().reshape(len(following), len(weight), -1)
    parameters += len(following) * blocks.shape[2]
    odd = step.activation.odd and step.keeps_sign
    return _Joint(weight, bias, blocks.abs().sum(2), parameters, step.activation, odd)


def _merges(step: Step, joint: _Joint, group: Sequence[int], similar_above: float) -> list[Merge]:
    """What could be merged among a group of near-duplicates.

    The neuron to keep is the one that most others are near to, then with the smallest bound. What
    is not near to it, in a chain of near-duplicates, is looked at again without those.
    """
    left = torch.tensor(group)
    found: list[Merge] = []
    while len(left) > 1 and len(found) < _PER_GROUP:
        best: _Choice | None = None
        step_size = -(-len(left) // _CANDIDATES)
        for kept in left[::step_size].tolist():
            choice = _choice(joint, kept, left, similar_above)
            if best is None or choice.order() < best.order():
                best = choice
        assert best is not None
        if len(best.dropped):
            found.append(_merge(step, joint, best))
        gone = torch.cat([best.dropped, torch.tensor([best.kept])])
        left = left[~torch.isin(left, gone)]
    return found


@dataclass(frozen=True)
class _Choice:
    """Neurons that may be merged into one.

    Args:
        kept: The one that stays.
        dropped: The others (m,).
        factors: What they are times the one that stays, (m,).
        slopes: Bounds on the changes of all outputs of the next layer, by the input's norm, (n2,).
        offsets: What biases add, (n2,).
    """

    kept: int
    dropped: Tensor
    factors: Tensor
    slopes: Tensor
    offsets: Tensor

    def order(self) -> tuple[int, float]:
        """The least for most neurons, then for the smallest bound."""
        return -len(self.dropped), float((self.slopes + self.offsets).max())


def _choice(joint: _Joint, kept: int, group: Tensor, similar_above: float) -> _Choice:
    """What of a group can be merged into one of its neurons."""
    others = group[group != kept]
    w = joint.weight[others]
    to = joint.weight[kept]
    lengths = torch.linalg.vector_norm(w, dim=1)
    length = torch.linalg.vector_norm(to)
    products = w @ to
    signs = torch.where(products < 0, -1.0, 1.0).to(w)
    near = (products.abs() >= similar_above * lengths * length) & (lengths > 0) & (length > 0)
    if not joint.odd:
        near &= signs > 0
    factors = signs * lengths / length
    if not joint.activation.homogeneous:
        near &= (lengths - length).abs() <= _SAME_LENGTH * torch.maximum(lengths, length)
        factors = signs
    near &= torch.isfinite(w).all(1) & torch.isfinite(joint.bias[others])
    near &= torch.isfinite(joint.bias[kept])
    others = others[near]
    factors = factors[near]
    distance = torch.linalg.vector_norm(w[near] - factors[:, None] * to, dim=1)
    shift = (joint.bias[others] - factors * joint.bias[kept]).abs()
    outgoing = joint.activation.slope * joint.outgoing[:, others]
    return _Choice(kept, others, factors, outgoing @ distance, outgoing @ shift)


def _merge(step: Step, joint: _Joint, choice: _Choice) -> Merge:
    """A merge with its bound."""
    length = torch.linalg.vector_norm(joint.weight, dim=1)
    outgoing = joint.activation.slope * joint.outgoing
    reach = (length + joint.bias.abs()).nan_to_num(0.0, posinf=0.0)
    of_outputs = float((outgoing @ reach).max())
    change = float((choice.slopes + choice.offsets).max())
    return Merge(
        layer=step.layer,
        following=step.following,
        kept=choice.kept,
        dropped=tuple(choice.dropped.tolist()),
        factors=tuple(choice.factors.tolist()),
        slope=float(choice.slopes.max()),
        offset=float(choice.offsets.max()),
        share=change / of_outputs if of_outputs > 0 else 0.0,
        saved=len(choice.dropped) * joint.parameters,
        norm=step.norm,
        condition=step.condition,
        activation=step.activation.name,
    )


def merge_lines(merges: Merges) -> list[str]:
    """A line for each merge, and what the numbers mean; none is longer than 80 columns."""
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
    if merges.found:
        lines += _explained(merges.found)
    if merges.not_followed:
        lines.append(Line(_not_followed(merges)))
    found = []
    for line in lines:
        found += wrapped(line)
    return found


def _explained(merges: Sequence[Merge]) -> list[Line]:
    """What the numbers of merges mean."""
    what = (
        "(x c): add c times the neuron's column of the next layer to that of the one that is kept, "
        "then drop its row and that column, and its numbers in a batch norm between; of W_enc and "
        "W_dec that are stored transposed, rows are columns"
    )
    bound = (
        "bound: no output of the next layer changes by more, in eval mode; |x| is the norm of the "
        "layer's input, of a convolution that of the largest patch; %: that bound over the same "
        "bound on the outputs themselves, both at |x| = 1"
    )
    if not any("W_enc" in merge.layer or "W_dec" in merge.following for merge in merges):
        what = what.partition(";")[0]
    if all(merge.norm is None for merge in merges):
        what = what.replace(", and its numbers in a batch norm between", "")
    return [Line(what), Line(bound)]


def _not_followed(merges: Merges) -> str:
    """Which layers have near-duplicates, but no known next layer, and what to do about it."""
    names = merges.not_followed
    if len(names) == 1:
        line = f"{layer_named(names[0])} has near-duplicates, but no known next layer"
    else:
        folded = fold_names(names).removesuffix(f" ({len(names):,})")
        line = (
            f"{len(names):,} layers have near-duplicates, but no known next layer, so that nothing is "
            f"said of merging there: {folded}"
        )
    if merges.way_out:
        line += f"; {merges.way_out}"
    return line


def _line(merge: Merge) -> str:
    """A merge in a line."""
    words = []
    for neuron, factor in zip(merge.dropped[:_LISTED], merge.factors, strict=False):
        words.append(f"{neuron} (x {number(factor, 3)})")
    if len(merge.dropped) > _LISTED:
        words.append(f"{len(merge.dropped) - _LISTED:,} more")
    between = merge.condition or f"{merge.activation} between"
    if merge.norm is not None:
        between = f"batch norm {merge.norm} in eval mode, {between}"
    bound = f"{_short(merge.slope)} |x|"
    if merge.offset > 0:
        bound += f" + {_short(merge.offset)}"
    bound = bound.replace(" ", NO_BREAK)
    return (
        f"{layer_named(merge.layer)}: keep {merge.kept} <- {', '.join(words)}; outputs of "
        f"{layer_named(merge.following)} change by at most {bound}, {100 * merge.share:.2g} % of "
        f"the bound on them; {between}; saves {merge.saved:,} parameters"
    )


def _short(x: float) -> str:
    return f"{x:.3g}"
