"""A report on all layers of a model, a state dict or a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_hsu._checks import check_count, check_number
from lightning_hsu._neurons.candidates import NeuronSet, Skip
from lightning_hsu._neurons.heads import GUESSED
from lightning_hsu._neurons.how import Neurons
from lightning_hsu._neurons.patterns import Patterns
from lightning_hsu._neurons.select import Head, select
from lightning_hsu._neurons.state_dict import neurons_of_state_dict
from lightning_hsu._neurons.wrappers import unwrapped
from lightning_hsu.measures import Measure
from lightning_hsu.measures.base import check_measure
from lightning_hsu.measures.defaults import REPORT_MEASURE
from lightning_hsu.report.checkpoints import Checkpoint, read_checkpoint
from lightning_hsu.report.data import ReportData
from lightning_hsu.report.following import steps_of_model
from lightning_hsu.report.following_names import steps_of_names
from lightning_hsu.report.looks import SAMPLE_ABOVE, Looks, Progress
from lightning_hsu.report.merge_list import Merges
from lightning_hsu.report.merging import merges_of
from lightning_hsu.report.page import report_page
from lightning_hsu.report.report_table import report_table, verdicts
from lightning_hsu.report.steps import Steps
from lightning_hsu.report.tables import plain, short, table_html

Source = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True, eq=False)
class Report(ReportData):
    """Every layer of a network compared with random neurons; print it, or write a page or JSON.

    Args:
        source: What was read: a file, or the class of a model.
        measure: How layers were measured, except for those in full space.
        similar_above: Cosine at or above which two neurons are near-duplicates.
        layers: The layers, in the model's order.
        skips: Weights that were left out, with the reason.
        notes: Names of layers with what one should know of how they were read.
        merges: Near-duplicates that could be merged into one, if that was asked for.
    """

    merges: Merges | None = None

    def to_dict(self) -> dict[str, Any]:
        """As of :class:`ReportData`, with the merges if they were asked for."""
        found = super().to_dict()
        if self.merges is not None:
            found["merges"] = self.merges.to_dict()
        return found

    def __str__(self) -> str:
        """The table, in plain text, and the merges if they were asked for."""
        if self.merges is None:
            return self.table()
        return f"{self.table()}\n{self.merges}"

    def __repr__(self) -> str:
        """What was read and how many layers are above random, in one line."""
        return f"<Report on {short(self.source)}: {verdicts(self.layers)}>"

    def _repr_html_(self) -> str:
        """The table, and the merges if they were asked for, for a notebook."""
        found = table_html(report_table(self), self.source)
        if self.merges is not None:
            found += "\n" + self.merges._repr_html_()
        return found

    def table(self, top: int | None = None) -> str:
        """The table, in plain text.

        Args:
            top: How many layers to show, the worst first; None shows all in the model's order.

        Raises:
            ValueError: if top is not an int of at least 1.

        Example:
            >>> found = report(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 4)))
            >>> "not shown: 2 of 3 layers" in found.table(top=1)
            True
        """
        if top is not None:
            check_count("top", top, 1)
        return plain(report_table(self, top))

    def to_html(self) -> str:
        """The report as one page: no script, nothing to load."""
        merges = "" if self.merges is None else self.merges._repr_html_()
        return report_page(self, merges)

    def write_html(self, path: str | Path) -> None:
        """Write :meth:`to_html` to a file."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


def report(
    source: Source,
    measure: Measure | None = None,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    head: Head = "auto",
    neurons: Neurons = None,
    similar_above: float = 0.95,
    keep: int = 100,
    key: str | None = None,
    base: str | Path | None = None,
    sample_above: int | None = SAMPLE_ABOVE,
    merge: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Look at the neurons of every layer of a network.

    A model is read as in training, but with embeddings, and with depthwise convolutions over all
    their channels. In a state dict or a file the layers are read from names and shapes, those
    beside a weight too: which axis holds the neurons, groups, experts, fused projections. Where
    nothing tells, a note says which reading was taken. A weight that is named like none is left
    out unless ``include`` or ``neurons`` names it. The head and layers of two neurons are measured in full
    space, where opposite neurons rightly count as far apart.

    On two cores ten thousand layers of 4 x 4 take 4 seconds, of mixed shapes up to 64 x 64 16, with
    0.6 GiB. An embedding of 50257 x 768 takes 17 and 0.7 GiB, a million neurons of dimension 64
    take 17 and 1 GiB: their energy is that of a sample, and among a million neurons near-duplicates
    are searched by random hashes, so that there may be more. Table, page and JSON say so.
    ``python -m benchmarks.report`` measures it.

    Args:
        source: A model, a state dict, or a file: Lightning's .ckpt, a state dict in .pt, .pth or
            .bin, .safetensors, TorchScript; or a folder: of Hugging Face's libraries, whole or in
            parts, of a Trainer, of sentence-transformers, of a sparse autoencoder, of an adapter
            of peft with its base. No code in a file is run, and nothing is downloaded.
        measure: How to measure; None is the half-space Riesz energy with s = 2.
        include: Patterns of layer names to take, shell style; None takes all.
        exclude: Patterns of layer names to leave out.
        head: The class head: "auto" is what a model declares, else a guess by names and order; a
            name or a list of names are these layers; None is no head.
        neurons: How weights hold neurons: a mapping from patterns of their names ("decoder",
            "experts.*.W") to "rows", "columns", a number of equal parts along the rows, or a
            function of the weight to its neurons (..., n, d). What it names is taken in.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        keep: How many of a layer's near-duplicate pairs, and of their groups, to list.
        key: Where in a file the state dict is; None finds it.
        base: For an adapter of peft: the file or folder of its base. None takes the local folder
            that the adapter's configuration names, if there is one.
        sample_above: Neurons of a group above which the energy is that of a sample of so many, with
            its standard error, the same each time; None never samples. A measure that is no mean
            over pairs is not sampled.
        merge: How many merges of near-duplicate neurons into one to list, with the bound on what
            the next layer notices, see :func:`merges`; None looks for none.
        progress: Called with the layer's name and the fraction of the work that is done.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file holds no weights that can be read, a pattern or a head's name matches
            nothing, or a weight does not have the parts or the shape that ``neurons`` says.
        TypeError: for a source, a measure or a way of holding neurons of the wrong type.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[7].copy_(2 * model[0].weight[3])
        >>> found = report(model)
        >>> [layer.finding.split(", ")[-1] for layer in found.layers]
        ['2 neurons in 1 near-duplicate group', 'as random']
        >>> found.layers[0].pairs
        (SimilarPair(group=0, first=3, second=7, angle=0.0),)
        >>> found = report({"W_dec": torch.randn(16, 64)}, neurons={"W_dec": "columns"})
        >>> [(layer.name, layer.shape) for layer in found.layers]
        [('W_dec', '64 x 16')]
    """
    if merge is not None:
        check_count("merge", merge, 1)
    found = find_targets(source, include, exclude, head, key, neurons, base)
    looked_at = look_at_all(found, measure, similar_above, keep, progress, sample_above)
    if merge is None:
        return looked_at
    assert found.steps is not None
    steps = found.steps()
    merges = merges_of(steps, found.targets, looked_at.layers, similar_above, merge)
    return replace(looked_at, merges=merges)


def merges(
    source: Source,
    *,
    most: int = 20,
    include: Patterns = None,
    exclude: Patterns = None,
    similar_above: float = 0.95,
    keep: int = 100,
    key: str | None = None,
    base: str | Path | None = None,
) -> Merges:
    """Which near-duplicate neurons could be merged into one, and what the next layer notices.

    Layers that follow each other: Linear on Linear, convolution on convolution, convolution on
    Linear, one group each, with an elementwise activation between them, a batch norm in eval mode
    right after the first, dropout, pooling and a flattening. In a model ``torch.fx`` finds them,
    else the order in ``nn.Sequential``; in a file names and shapes do, which tell nothing of the
    activation: the condition stands beside each merge. So a sparse autoencoder's ``encoder`` or
    ``W_enc`` is followed by its ``decoder`` or ``W_dec``. Of layers with near-duplicates that are not
    merged, ``not_followed`` and ``not_merged`` give the reasons; ``together`` adds up all merges of
    a layer.

    Through ReLU, leaky ReLU, PReLU or nothing a neuron is replaced by another one times the ratio of
    their lengths; slopes of a PReLU may differ by a tenth. Other activations need equal lengths, up
    to a tenth. Neurons that point opposite ways are merged through odd functions only. With a batch
    norm or such a PReLU after it, a Linear layer is taken to get inputs of shape (batch, features).

    Args:
        source: As for :func:`report`.
        most: How many merges to list, those with the smallest share of the outputs' bound first.
        include: Patterns of layer names to take, shell style; None takes all.
        exclude: Patterns of layer names to leave out.
        similar_above: Cosine at or above which two neurons are near-duplicates, in (0, 1).
        keep: How many groups of each layer to look at, the largest.
        key: Where in a file the state dict is; None finds it.
        base: For an adapter of peft: the file or folder of its base.

    Raises:
        ValueError: as for :func:`report`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> with torch.no_grad():
        ...     _ = model[0].weight[7].copy_(2 * model[0].weight[3])
        ...     _ = model[0].bias[7].copy_(2 * model[0].bias[3])
        >>> (merge,) = merges(model).found
        >>> merge.layer, merge.following, merge.kept, merge.dropped, merge.slope, merge.saved
        ('0', '2', 3, (7,), 0.0, 75)
    """
    found = report(
        source,
        include=include,
        exclude=exclude,
        similar_above=similar_above,
        keep=keep,
        key=key,
        base=base,
        merge=most,
    )
    assert found.merges is not None
    return found.merges


def look_at_all(
    found: FoundTargets,
    measure: Measure | None,
    similar_above: float,
    keep: int = 100,
    progress: Progress | None = None,
    sample_above: int | None = SAMPLE_ABOVE,
) -> Report:
    """Report on what :func:`find_targets` found; other arguments as in :func:`report`."""
    if measure is None:
        measure = REPORT_MEASURE
    check_measure(measure)
    check_count("keep", keep, 0)
    check_number("similar_above", similar_above, "in (0, 1)", lambda x: 0 < x < 1)
    if sample_above is not None:
        check_count("sample_above", sample_above, 4)
    looks = Looks(found.targets, measure, sample_above, similar_above, keep, progress)
    layers = []
    for layer in looks.take():
        layers.append(replace(layer, uniformity=layer.uniformity.unless_broken()))
    notes = (*found.notes, *_notes_of(found.targets))
    return Report(found.source, measure, similar_above, tuple(layers), tuple(found.skips), notes)


def _notes_of(targets: Sequence[NeuronSet]) -> tuple[tuple[str, str], ...]:
    """What one should know of how layers were read, and which was guessed to be the head.

    Args:
        targets: The layers.
    """
    notes = []
    heads = {}
    for target in targets:
        if target.note:
            notes.append((target.name, target.note))
        if target.head_reason.startswith(GUESSED):
            heads[target.layer or target.name] = target.head_reason
    if heads:
        reason = next(iter(heads.values()))
        taken = f"{', '.join(heads)} ({reason})"
        notes.append(("head", f'{taken}; head="NAME" or head=None otherwise'))
    return tuple(notes)


class FoundTargets(NamedTuple):
    """The neurons of a source.

    Args:
        source: Name of the source.
        targets: Its sets of neurons.
        skips: Weights that are left out, with the reason.
        notes: Pairs of a name, or "", and what one should know of how the source was read.
        steps: Returns which layer follows which.
    """

    source: str
    targets: Sequence[NeuronSet]
    skips: list[Skip]
    notes: tuple[tuple[str, str], ...] = ()
    steps: Callable[[], Steps] | None = None


def find_targets(
    source: Source,
    include: Patterns,
    exclude: Patterns,
    head: Head,
    key: str | None,
    neurons: Neurons = None,
    base: str | Path | None = None,
    compared_with: Source | None = None,
) -> FoundTargets:
    """Find the neurons of a source; other arguments as in :func:`report`.

    Args:
        source: The source.
        include: Patterns of layer names to take.
        exclude: Patterns of layer names to leave out.
        head: The class head.
        key: Where in a file the state dict is.
        neurons: How weights hold neurons.
        base: Of an adapter.
        compared_with: The source that it is compared with: if this is a file or folder, it is the
            base of an adapter that names no other.
    """
    if isinstance(source, nn.Module) and not isinstance(source, torch.jit.ScriptModule):
        model = unwrapped(source)
        targets, skips = select(model, include, exclude, head, neurons=neurons, everything=True)
        steps = partial(steps_of_model, model)
        name = type(model).__name__
        return FoundTargets(name, targets, skips, _base_not_used(base, "a model"), steps)
    other = compared_with if isinstance(compared_with, (str, Path)) else None
    found = _checkpoint_of(source, key, base, other)
    load = found.load if found.stays_in_file else None
    others: list[Skip] = []
    try:
        candidates = neurons_of_state_dict(
            found.tensors, include, neurons, load=load, config=found.config
        )
        others = candidates.not_weights
        stored, skips = select(candidates, include, exclude, head, everything=True)
    except ValueError as error:
        message = f"{found.name}: {error}"
        for skip in others:
            message += f"\n  {skip.name} {skip.shape}: {skip.reason}"
        raise ValueError(message) from error
    notes = [*found.notes]
    for note in candidates.notes:
        notes.append(("", note))
    steps = partial(steps_of_names, found.tensors, found.load)
    return FoundTargets(found.name, stored, [*skips, *others], tuple(notes), steps)


def _checkpoint_of(
    source: Source, key: str | None, base: str | Path | None, compared_with: str | Path | None
) -> Checkpoint:
    """The weights of TorchScript, a file, a folder or a state dict."""
    if isinstance(source, (str, Path)):
        if source == "":
            raise ValueError("the name of the file to read is empty")
        found = read_checkpoint(source, key, base, compared_with)
        if not found.tensors:
            message = f"{found.name} holds no weights that can be read"
            for name, note in found.notes:
                message += f"\n  {name}: {note}"
            raise ValueError(message)
        return found
    if isinstance(source, nn.Module):
        name, state = type(source).__name__, source.state_dict()
    elif isinstance(source, Mapping):
        name, state = "state dict", dict(source)
    else:
        kind = type(source).__name__
        raise TypeError(f"a report is on a model, a state dict or a file; got {kind}")
    notes = _base_not_used(base, "weights that are not in a file")
    return Checkpoint(name, state, state.__getitem__, None, notes)


def _base_not_used(base: str | Path | None, source: str) -> tuple[tuple[str, str], ...]:
    """A note on a base that was given beside something that is no adapter; none without one."""
    if base is None:
        return ()
    return (("", f"the base {base} was not used: it belongs to an adapter, this is {source}"),)
