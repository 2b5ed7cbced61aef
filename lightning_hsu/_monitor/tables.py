"""What is said of a fit's layers: at the start, when they change, and before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lightning_hsu._checks import listed
from lightning_hsu._core.limits import SAFE_SHARE
from lightning_hsu._engine.change import Change
from lightning_hsu._engine.layer import Layer
from lightning_hsu._monitor.measure import LayerUniformity
from lightning_hsu._monitor.summary import LayerSummary, Summary, coefficient_text, giga_flops
from lightning_hsu._monitor.text import (
    AS_RANDOM,
    RULE,
    SCORE,
    finding,
    number,
    score_text,
    shape_of,
    table_lines,
    without_empty,
)
from lightning_hsu._neurons.candidates import Skip
from lightning_hsu.measures.defaults import SHARE_LIMIT

_COLUMNS = ("layer", "neurons x dim", "ratio", "score after", "smallest angle", "dead", "finding")
_NAMED = 3  # layers that are named of each kind of change
_TEXTS = ("layer", "neurons x dim", "finding")  # columns that are aligned on the left


class BeforeAfter:
    """Keeps the first measurement of each layer in a fit and compares the last one with it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_hsu.regularizer import UniformityRegularizer
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
        >>> regularizer = UniformityRegularizer().attach(model)
        >>> before_after = BeforeAfter()
        >>> before_after.note(0, regularizer.measure_layers())
        >>> table = before_after.table(10, regularizer.layers, regularizer.measure_layers())
        >>> table.splitlines()[0]
        'Hyperspherical uniformity before and after, optimizer steps 0 to 10:'
    """

    def __init__(self) -> None:
        self._step = 0
        self._before: dict[str, LayerUniformity] = {}

    def note(self, step: int, measured: Sequence[LayerUniformity]) -> None:
        """Keep a measurement if it is the first of a layer, or of one of another shape.

        Args:
            step: Optimizer steps done.
            measured: The layers.
        """
        if not self._before:
            self._step = step
        for layer in measured:
            known = self._before.get(layer.name)
            if known is None or _shape(known) != _shape(layer):
                self._before[layer.name] = layer

    def forget(self, names: Collection[str] | None = None) -> None:
        """Forget the first measurement of some layers, or of all: another takes its place."""
        for name in [*self._before] if names is None else names:
            self._before.pop(name, None)

    def table(self, step: int, layers: Sequence[Layer], measured: Sequence[LayerUniformity]) -> str:
        """The last measurement beside the first, one row for each layer.

        Args:
            step: Optimizer steps done.
            layers: The layers.
            measured: The same layers, measured at this step.
        """
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for layer, after in zip(layers, measured, strict=True):
            rows.append(self._row(layer, after))
        steps = f"{self._step:,} to {step:,}"
        title = f"Hyperspherical uniformity before and after, optimizer steps {steps}:"
        rows = without_empty(rows, "score after")
        right = []
        for place, heading in enumerate(rows[0]):
            if heading not in _TEXTS:
                right.append(place)
        lines = [title, *table_lines(rows, right=right)]
        if "score after" in rows[0]:
            lines.append(SCORE)
        if any(row[-1].startswith(AS_RANDOM) for row in rows):
            lines.append(RULE)
        return "\n".join(lines)

    def _row(self, layer: Layer, after: LayerUniformity) -> tuple[str, ...]:
        before = self._before[after.name]
        return (
            after.name,
            shape_of(after.groups, after.neurons, after.dimension),
            f"{_ratio(before.ratio)} -> {_ratio(after.ratio)}",
            score_text(after.score),
            f"{number(before.min_angle, 1)} -> {number(after.min_angle, 1)}",
            f"{after.dead:,}",
            finding(after, layer.measure),
        )


def _shape(layer: LayerUniformity) -> tuple[int, int, int]:
    return layer.groups, layer.neurons, layer.dimension


def _ratio(x: float) -> str:
    return number(x, 3 if x < 10 else 1)


def change_text(change: Change) -> str:
    """What has become of the layers of a model that was changed in training.

    Example:
        >>> print(change_text(Change(added={"fc.1": (1, 8, 4)}, gone={"fc": (1, 16, 4)})))
        the model has changed:
          now measured: fc.1 (8 x 4)
          no longer there: fc (16 x 4)
    """
    named = {
        "now measured": _with_shapes(change.added),
        "with other weights": _with_shapes(change.renewed),
        "renamed": [f"{old} -> {new}" for old, new in change.renamed.items()],
        "no longer there": _with_shapes(change.gone),
        "no longer measured": list(change.lost),
    }
    lines = ["the model has changed:"]
    for what, names in named.items():
        if names:
            lines.append(f"  {what}: {listed(names, _NAMED)}")
    return "\n".join(lines)


def zeros_text(layers: Sequence[Layer], *, is_limited: bool) -> str:
    """What is to be known of layers that start at zero.

    Args:
        layers: The layers.
        is_limited: Whether the penalty's gradient is held to a share of the task's.
    """
    named = []
    for layer in layers:
        named.append(f"'{layer.name}' ({shape_of(*layer.target.shape)})")
    begin = f"layer {listed(named)} starts at zero and has no directions until the task moves it: "
    if is_limited:
        return (
            f"{begin}the limit by the task's gradient keeps the penalty from deciding them. There is "
            "nothing to do about it"
        )
    limit = f"Set share_limit={SHARE_LIMIT:g}"
    if any(layer.has_share for layer in layers):
        limit = f"Take Share({SHARE_LIMIT:g}), or a number and share_limit={SHARE_LIMIT:g}"
    return (
        f"{begin}then its neurons are tiny, and the penalty, whose gradient is the larger the smaller "
        "they are, may decide these instead of the task, which then learns nothing. "
        f"{limit}, which needs apply='gradient' or 'decoupled', or leave the layer "
        "out with exclude= or a coefficient of 0"
    )


def broken_by_penalty(apply: str) -> str:
    """What to add where weights are NaN and no share limit keeps the penalty below the task.

    Args:
        apply: How the penalty enters, as the callback says it.
    """
    begin = " The penalty may be the cause, too, since no share limit keeps it below the task"
    if apply == "loss":
        return (
            f"{begin} in the loss: take a smaller coefficient, or apply='gradient' with "
            f"share_limit={SHARE_LIMIT:g}."
        )
    return f"{begin}: take share_limit={SHARE_LIMIT:g}, or a smaller coefficient."


def _with_shapes(shapes: Mapping[str, tuple[int, int, int]]) -> list[str]:
    return [f"{name} ({shape_of(*shape)})" for name, shape in shapes.items()]


def summary_of(
    model: str,
    layers: Sequence[Layer],
    skips: Sequence[Skip],
    coverage: float,
    every_n_steps: int,
    tolerance: float | None,
    limit: str = "",
) -> Summary:
    """What is measured of a model, for the table at the start of a fit.

    Args:
        model: Name of the model's class.
        layers: The layers.
        skips: Weights that are not measured.
        coverage: Measured entries over those of all weights with two or more axes.
        every_n_steps: The penalty is applied on every n-th step of each optimizer.
        tolerance: The relative error of gradients that are kept for several steps; None keeps none.
        limit: What limits the penalty beside the task, in words.
    """
    rows = []
    for layer in layers:
        row = LayerSummary(
            layer.name,
            layer.target.shape,
            layer.target.head,
            layer.trainable,
            layer.measure,
            layer.target.head_reason,
            coefficient_text(layer),
            giga_flops(layer) / every_n_steps,
            layer.target.note,
            layer.target.in_buffer,
        )
        rows.append(row)
    return Summary(model, tuple(rows), tuple(skips), coverage, every_n_steps, tolerance, limit)


def limit_text(
    layers: Sequence[Layer], share_limit: float | None, *, apply: str = "gradient"
) -> str:
    """What limits the penalty beside the task, in words; "" where each layer has a share of its own.

    Args:
        layers: The layers.
        share_limit: The largest norm of a layer's penalty gradient over that of its task gradient.
        apply: How the penalty enters, as the callback says it.
    """
    shares = [layer.has_share for layer in layers if layer.strength != 0]
    if shares and all(shares):
        return ""
    if share_limit is None:
        return "no share limit: its gradient may be above the task's"
    if apply == "loss":
        return "no share limit: in the loss the task's gradient is not known by itself"
    which = "each layer without a Share" if any(shares) else "each layer"
    of = "the optimizer's step" if apply == "decoupled" else "the task's gradient"
    found = f"share limit: at most {share_limit:g} of {of} in {which}"
    if share_limit > SAFE_SHARE:
        found += f" (above {SAFE_SHARE:g} it may cost the task)"
    return found
