"""Goes through all layers of a report: many small ones at once, very large ones by a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_hsu._core.parts import Done
from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu.measures import Measure
from lightning_hsu.measures.sampled import measure_of_layer
from lightning_hsu.report.analysis import look_at
from lightning_hsu.report.data import LayerReport
from lightning_hsu.report.sample import BLOCK, is_sampled, look_at_sample
from lightning_hsu.report.together import SmallLayer, is_small, look_at_together
from lightning_hsu.report.work import work_of, work_of_sample

Progress = Callable[[str, float], None]
"""Called with the current layer and the fraction of all work that is done."""

SAMPLE_ABOVE = 16384
"""Neurons of a group above which a report measures a sample of so many."""

_FEW = 16  # small layers that are as quickly looked at one by one
_WAITING = 2**22  # entries of small layers that are read before they are looked at
_OVERHEAD = 1e6  # of a layer, in the unit of ``report/work.py``


class Looks:
    """Looks at layers; arguments as those of :func:`lightning_hsu.report.report`.

    The neurons of a layer are read when it is looked at and not kept.
    """

    def __init__(
        self,
        targets: Sequence[NeuronSet],
        measure: Measure,
        sample_above: int | None,
        similar_above: float,
        keep: int,
        progress: Progress | None,
    ) -> None:
        self.targets = targets
        self.sample_above = sample_above
        self.similar_above = similar_above
        self.keep = keep
        self.progress = progress
        self.measures = []
        self.work = []
        small = 0
        for target in targets:
            n = target.shape[1]
            is_head = target.head or n == 2  # two neurons are at best opposite
            own = measure_of_layer(measure, is_head=is_head, neurons=n, sample_above=None)
            self.measures.append(own)
            self.work.append(_OVERHEAD + sum(self._work_of(target, own).values()))
            small += is_small(target.shape, own)
        self.together = small >= _FEW
        self.all_work = sum(self.work)
        self.work_before = 0.0
        self.told = 0.0
        self.found: dict[int, LayerReport] = {}
        self.waiting: list[int] = []  # small layers
        self.read: list[SmallLayer] = []  # their neurons

    def take(self) -> list[LayerReport]:
        """Look at all layers; return what is found, in their order."""
        entries = 0
        for i, target in enumerate(self.targets):
            if self.together and is_small(target.shape, self.measures[i]):
                x = target.neurons().detach()
                self.waiting.append(i)
                self.read.append(SmallLayer(target.name, x, self.measures[i]))
                entries += x.numel()
                if entries > _WAITING:
                    self._look_at_waiting()
                    entries = 0
            else:
                self._look_at_one(i)
        self._look_at_waiting()
        return [self.found[i] for i in range(len(self.targets))]

    def _look_at_one(self, i: int) -> None:
        """Look at a layer by itself."""
        target = self.targets[i]
        done = self._done(i)
        done(0.0)
        x = target.neurons()
        measure = self.measures[i]
        if self.sample_above is not None and is_sampled(target.shape, measure, self.sample_above):
            self.found[i] = look_at_sample(
                target.name,
                x,
                measure,
                sampled=self.sample_above,
                similar_above=self.similar_above,
                keep=self.keep,
                done=done,
            )
        else:
            self.found[i] = look_at(
                target.name,
                x,
                measure,
                similar_above=self.similar_above,
                keep=self.keep,
                done=done,
            )
        done(1.0)
        self.work_before += self.work[i]

    def _look_at_waiting(self) -> None:
        """Look at the small layers that have been read."""
        found = look_at_together(self.read, similar_above=self.similar_above, keep=self.keep)
        for i, layer in zip(self.waiting, found, strict=True):
            self.found[i] = layer
            self._done(i)(1.0)
            self.work_before += self.work[i]
        self.waiting = []
        self.read = []

    def _work_of(self, target: NeuronSet, measure: Measure) -> dict[str, float]:
        """The work of looking at a layer."""
        if self.sample_above is not None and is_sampled(target.shape, measure, self.sample_above):
            return work_of_sample(target.shape, self.sample_above, BLOCK)
        return work_of(target.shape)

    def _done(self, i: int) -> Done:
        """What a layer calls with its own fraction, to tell that of all layers."""
        work = self.work[i]
        before = self.work_before

        def done(part: float) -> None:
            if self.progress is None:
                return
            fraction = min((before + part * work) / self.all_work, 1.0)
            self.told = max(self.told, fraction)  # rounding may not move it back
            self.progress(self.targets[i].name, self.told)

        return done
