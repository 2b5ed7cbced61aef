"""Which near-duplicate neurons could be merged into one, and how much the next layer would notice.

Neuron j with weights w_j, b_j gives h_j = f(w_j x + b_j). If f(c z) = c f(z) for c >= 0, as of ReLU,
h_j is nearly c h_i where w_j is nearly c w_i. So neuron j can be dropped if c times its column in the
next layer is added to that of neuron i. With outgoing weights v_kj, output k then changes by at most

    sum over j of |v_kj| L (|w_j - c w_i| |x| + |b_j - c b_i|)

where L is the largest slope of f. The bound is linear in the norm |x| of the layer's input; for a
convolution |v_kj| is the sum over the places of the kernel, and |x| the norm of the largest patch.

A PReLU with a slope a_j for each neuron has h_j = f_j(z_j) with z_j = w_j x + b_j, and

    f_j(z_j) - c f_i(z_i) = f_j(z_j) - f_j(c z_i) + (a_j - a_i) min(c z_i, 0)

because c f_i(z_i) = f_i(c z_i). So |a_j - a_i| c (|w_i| |x| + |b_i|) is added in the sum over j, where
L is the larger of 1 and |a_j|.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu.report.activations import Activation
from lightning_hsu.report.data import LayerReport, SimilarGroup
from lightning_hsu.report.merge_list import Merge, Merges, NotMerged, Together
from lightning_hsu.report.steps import Step, Steps, dictionary_of

_CANDIDATES = 16  # neurons of a group that may be the one that is kept, evenly spaced
_SAME_LENGTH = 0.1  # lengths may differ by so much where the activation is not homogeneous
_PER_GROUP = 20  # merges of a group, which may be a long chain
_NO_ROWS = "its neurons are not the rows of its weight"
_SAME_SLOPE = 0.1  # slopes of a PReLU may differ by so much


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
        slopes: Of a PReLU with one for each neuron, (n,); None without one.
    """

    weight: Tensor
    bias: Tensor
    outgoing: Tensor
    parameters: int
    activation: Activation
    odd: bool
    slopes: Tensor | None = None

    def steepest(self) -> Tensor:
        """The largest slope of each neuron's activation (n,)."""
        if self.slopes is None:
            return self.bias.new_full(self.bias.shape, self.activation.slope)
        return self.slopes.abs().clamp(min=1.0)

    def outputs(self) -> float:
        """What the next layer can make of its neurons at most, for inputs of norm 1."""
        length = torch.linalg.vector_norm(self.weight, dim=1)
        reach = self.steepest() * (length + self.bias.abs())
        return float((self.outgoing @ reach.nan_to_num(0.0, posinf=0.0)).max())


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
    together = []
    pairs = []
    not_merged = []
    reasons = {}
    for step in steps.steps:
        if step.layer not in places:
            continue
        place = places[step.layer]
        groups = layers[place].groups
        if not _plain(targets[place], step.stored().shape(steps.shapes)):
            reasons[step.layer] = _NO_ROWS
            continue
        if groups:
            rows = targets[place].neurons()[0].detach().cpu().double()
            if not torch.equal(rows.nan_to_num(), _rows(step, steps).double().nan_to_num()):
                reasons[step.layer] = _NO_ROWS
                continue
        pairs.append((step.layer, step.following))
        if not groups:
            continue
        joint = _joint(step, steps)
        choices = []
        for group in groups:
            choices += _choices(joint, group.neurons, similar_above)
        if not choices:
            reason = _why_not(step, joint, groups, similar_above)
            not_merged.append(NotMerged(step.layer, reason))
            continue
        for choice in choices:
            found.append(_merge(step, joint, choice))
        together.append(_together(step, joint, choices))
    found.sort(key=lambda merge: merge.share)
    followed = {layer for layer, _ in pairs}
    others = []
    for layer, target in zip(layers, targets, strict=True):
        if layer.groups and layer.name not in followed:
            why = _of_dictionary(target, steps) or reasons.get(layer.name)
            others.append(NotMerged(layer.name, why or steps.reason(layer.name)))
    return Merges(
        found=tuple(found[:most]),
        count=len(found),
        pairs=tuple(pairs),
        how=steps.how,
        not_followed=tuple(others),
        way_out=steps.way_out,
        not_merged=tuple(not_merged),
        together=tuple(together),
    )


def _of_dictionary(target: NeuronSet, steps: Steps) -> str:
    """Why the vectors of a dictionary are not merged by themselves; "" for another layer."""
    found = dictionary_of(target.name, steps.shapes)
    if found is None or target.shape[:2] != (1, found[1]):
        return ""
    return f"its neurons are the dictionary's own vectors; their merge is that of {found[0]}"


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
    slopes = None
    if step.prelu is not None:
        slopes = steps.tensor(step.prelu).detach().cpu().double()
        parameters += 1
    return _Joint(weight, bias, blocks.abs().sum(2), parameters, step.activation, odd, slopes)


def _choices(joint: _Joint, group: Sequence[int], similar_above: float) -> list[_Choice]:
    """What could be merged among a group of near-duplicates.

    The neuron to keep is the one that most others are near to, then with the smallest bound. What
    is not near to it, in a chain of near-duplicates, is looked at again without those.
    """
    left = torch.tensor(group)
    found: list[_Choice] = []
    if not bool(torch.isfinite(joint.outgoing).all()):
        return found
    while len(left) > 1 and len(found) < _PER_GROUP:
        best: _Choice | None = None
        step_size = -(-len(left) // _CANDIDATES)
        for kept in left[::step_size].tolist():
            choice = _choice(joint, kept, left, similar_above)
            if best is None or choice.order() < best.order():
                best = choice
        assert best is not None
        if len(best.dropped):
            found.append(best)
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
    near &= torch.isfinite(w).all(1) & torch.isfinite(joint.bias[others] + joint.bias[kept])
    steepest = joint.steepest()
    near &= torch.isfinite(steepest[others] + steepest[kept])
    if joint.slopes is not None:
        near &= (joint.slopes[others] - joint.slopes[kept]).abs() <= _SAME_SLOPE
    others = others[near]
    factors = factors[near]
    distance = torch.linalg.vector_norm(w[near] - factors[:, None] * to, dim=1)
    shift = (joint.bias[others] - factors * joint.bias[kept]).abs()
    distance = steepest[others] * distance
    shift = steepest[others] * shift
    if joint.slopes is not None:
        bent = (joint.slopes[others] - joint.slopes[kept]).abs() * factors
        distance = distance + bent * length
        shift = shift + bent * joint.bias[kept].abs()
    outgoing = joint.outgoing[:, others]
    return _Choice(kept, others, factors, outgoing @ distance, outgoing @ shift)


def _merge(step: Step, joint: _Joint, choice: _Choice) -> Merge:
    """A merge with its bound."""
    of_outputs = joint.outputs()
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
        prelu=step.prelu,
    )


def _together(step: Step, joint: _Joint, choices: Sequence[_Choice]) -> Together:
    """All merges of a layer, no neuron of which is in two."""
    slopes = torch.stack([choice.slopes for choice in choices]).sum(0)
    offsets = torch.stack([choice.offsets for choice in choices]).sum(0)
    seen: set[int] = set()
    dropped = 0
    for choice in choices:
        neurons = {choice.kept, *choice.dropped.tolist()}
        if seen & neurons:
            raise RuntimeError(f"{step.layer}: neurons {sorted(seen & neurons)} are in two merges")
        seen |= neurons
        dropped += len(choice.dropped)
    of_outputs = joint.outputs()
    return Together(
        layer=step.layer,
        following=step.following,
        count=len(choices),
        dropped=dropped,
        saved=dropped * joint.parameters,
        slope=float(slopes.max()),
        offset=float(offsets.max()),
        share=float((slopes + offsets).max()) / of_outputs if of_outputs > 0 else 0.0,
    )


def _why_not(
    step: Step, joint: _Joint, groups: Sequence[SimilarGroup], similar_above: float
) -> str:
    """Why no near-duplicates of a layer can be merged: what would have to be otherwise."""
    if not bool(torch.isfinite(joint.outgoing).all()):
        return f"weights of the next layer, {step.following}, are NaN or infinite"
    name = step.activation.name
    homogeneous = replace(joint.activation, homogeneous=True)
    otherwise = [
        ("PReLU slopes differ", replace(joint, slopes=None)),
        (f"they point opposite ways, which {name} tells apart", replace(joint, odd=True)),
        (f"their lengths differ, which {name} tells apart", replace(joint, activation=homogeneous)),
    ]
    for reason, other in otherwise:
        for group in groups:
            if _choices(other, group.neurons, similar_above):
                return reason
    if step.norm is not None:
        return f"they are none after batch norm {step.norm}"
    return "none of them can stand for another"
