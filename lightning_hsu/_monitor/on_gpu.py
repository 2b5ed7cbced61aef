"""Measurements of layers on a GPU, from the pass that computes their gradients, in one question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from lightning_hsu._core.group_numbers import GroupStats
from lightning_hsu._core.raw import GroupNumbers, group_numbers
from lightning_hsu._engine.ahead import Ahead
from lightning_hsu._engine.layer import Layer
from lightning_hsu._engine.plan import Plan
from lightning_hsu._monitor.measure import LayerUniformity, uniformity_of_groups


def measure_on_gpu(
    layers: Sequence[Layer], plan: Plan, ahead: Ahead
) -> dict[Layer, LayerUniformity]:
    """Measure the plain layers on a GPU; the host waits once.

    What was begun after the last step is used, where the weights are still the same. Layers with
    coincident neurons, or very many near pairs, are left out.

    Args:
        layers: The layers to measure.
        plan: The plan of the model's steps.
        ahead: What was begun after the last step.
    """
    wanted = set(layers)
    stacks = ahead.numbers(wanted)
    known: set[Layer] = set()
    for _, some in stacks:
        known.update(some)
    work = []
    left = []
    for plain in plan.plain:
        if plain.layer in wanted and plain.layer not in known:
            work.append((plain.reading(), plain.term))
            left.append(plain.layer)
    for numbers in group_numbers(work):
        stacks.append((numbers, [left[place] for place in numbers.places]))
    if not stacks:
        return {}
    found: dict[Layer, LayerUniformity] = {}
    for layer, groups in _read(stacks).items():
        if all(group.is_exact for group in groups):
            found[layer] = uniformity_of_groups(layer, groups)
    return found


def _read(
    stacks: Sequence[tuple[GroupNumbers, list[Layer]]],
) -> dict[Layer, list[GroupStats]]:
    """The numbers of each layer's groups, in one question to each device."""
    by_device: dict[torch.device, list[tuple[GroupNumbers, list[Layer]]]] = {}
    for stack in stacks:
        by_device.setdefault(stack[0].numbers.values.device, []).append(stack)
    found: dict[Layer, list[GroupStats]] = {}
    for some in by_device.values():
        tensors = [numbers.numbers.values for numbers, _ in some]
        together = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        values = iter(together.tolist())
        for numbers, layers in some:
            gathered = numbers.numbers
            groups = iter(gathered.of_groups(list(islice(values, gathered.values.numel()))))
            for layer, count in zip(layers, numbers.groups, strict=True):
                found[layer] = list(islice(groups, count))
    return found
