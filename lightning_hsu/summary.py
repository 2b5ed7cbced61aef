"""What the callback would measure of a model, without training it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightning_hsu._monitor.summary import LayerSummary, Summary
from lightning_hsu._neurons.how import Neurons
from lightning_hsu._neurons.patterns import Patterns
from lightning_hsu._neurons.select import Head
from lightning_hsu.regularizer import UniformityRegularizer

__all__ = ["LayerSummary", "Summary", "summarize"]


def summarize(
    model: nn.Module,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    neurons: Neurons = None,
) -> Summary:
    """Say which weights of a model are measured, and which are not and why; print the answer.

    The arguments are those of :class:`~lightning_hsu.HypersphericalUniformity`. A fit finds the same
    layers; which of them are heads it may know better, after its first forward pass.

    Args:
        model: A model, possibly wrapped by DDP, FSDP or Fabric. It is not changed.
        include: Patterns of layer names to take, shell style; None takes all but embeddings.
        exclude: Patterns of layer names to leave out.
        head: "auto" for what the model declares, else a guess by names and order; a name; a list
            of names; or None for no head.
        neurons: Patterns of weights' names, each with how such weights hold neurons: "rows",
            "columns", a number of equal parts along the rows, or a function of the weight to its
            neurons (..., n, d).

    Returns:
        The layers, the weights that are left out, and the coverage.

    Raises:
        ValueError: if a pattern or a head's name matches nothing, or a weight does not have the
            parts or the shape that ``neurons`` says.
        TypeError: for arguments of the wrong kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> summary = summarize(model)
        >>> [(layer.name, layer.shape, layer.is_head) for layer in summary.layers]
        [('0', (1, 16, 8), False), ('2', (1, 4, 16), True)]
        >>> summary.coverage
        1.0
    """
    regularizer = UniformityRegularizer(
        include=include, exclude=exclude, head=head, neurons=neurons
    )
    regularizer.attach(model, watch=False, strict=False)
    summary = regularizer.summary
    assert summary is not None
    layers = [replace(layer, coefficient="") for layer in summary.layers]
    return replace(summary, layers=tuple(layers))
