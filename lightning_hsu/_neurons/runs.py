"""Which convolutions of a state dict are transposed, as the widths along its layers show."""

from __future__ import annotations

from typing import NamedTuple

from lightning_hsu._neurons.shapes import Shape, Shapes

_BREAK = 100  # the cost of a layer that takes other than what the one before gives
_GROUPS = 40  # of groups that would explain it
_REVERSE_GROUPS = 45  # of groups of a transposed convolution
_TRANSPOSED = 1  # of two readings that fit, the common one is taken
_FROM_PICTURE = 45  # of a transposed convolution to a picture, as the first of all layers
_CLEAR = 80  # a reading is clear if any other one breaks the run once more
_OF_PICTURES = (1, 3)  # channels of a picture
_MOST_GROUPS = 64  # of a transposed convolution
_NEAR = 128  # layers before and after one that are looked at for a transposed one
_MOST_LAYERS = 20_000  # a run with more is not looked at


class Way(NamedTuple):
    """One way to read a layer.

    Args:
        inputs: Channels that it takes, of a group.
        outputs: Channels that it gives.
        is_transposed: Whether its kernels are (in, out, *kernel).
        cost: What it costs to read it so.
    """

    inputs: int
    outputs: int
    is_transposed: bool = False
    cost: int = 0


class Step(NamedTuple):
    """A layer of a run, with the ways to read it.

    Args:
        path: Its path.
        shape: The shape of its weight.
        ways: How it may be read.
    """

    path: str
    shape: Shape
    ways: tuple[Way, ...]

    @property
    def is_kernels(self) -> bool:
        """Whether it is a convolution."""
        return len(self.shape) > 2

    @property
    def is_wide(self) -> bool:
        """Whether its kernels have several places."""
        return any(size > 1 for size in self.shape[2:])


class Reading(NamedTuple):
    """How the kernels of a layer are read.

    Args:
        is_transposed: Whether they are (in, out, *kernel).
        is_sure: Whether nothing else fits the layers before and after.
        is_open: Whether the other reading fits as well, or nothing tells.
        groups: In how many groups, if they are transposed.
    """

    is_transposed: bool
    is_sure: bool
    is_open: bool
    groups: int = 1


class Runs:
    """Tells the orientation of kernels by what the layers before and after them take and give.

    All layers are taken as one run, those of a numbered list in the order of their numbers. Each
    has the ways to read it that its bias allows; of all ways through the run, the one in which the
    fewest layers take other than what the one before gives is the likely one.

    Args:
        shapes: The shapes of all tensors.

    Example:
        >>> import torch
        >>> layers = {
        ...     "0": {"weight": torch.empty(8, 3, 3, 3)},
        ...     "1": {"weight": torch.empty(8, 16, 4, 4)},
        ...     "2": {"weight": torch.empty(4, 16, 3, 3)},
        ... }
        >>> runs = Runs(Shapes(layers))
        >>> runs.reading("1").is_transposed, runs.reading("2").is_transposed
        (True, False)
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._readings: dict[str, Reading] | None = None

    def reading(self, path: str) -> Reading | None:
        """How the kernels of a layer are read; None if it has none, or its bias tells."""
        if self._readings is None:
            self._readings = self._found()
        return self._readings.get(path)

    def _found(self) -> dict[str, Reading]:
        """The readings of all kernels that may be transposed."""
        steps = self._steps()
        if len(steps) > _MOST_LAYERS or not any(len(step.ways) > 1 for step in steps):
            return {}
        self._with_groups(steps)
        costs, taken = self._costs(steps)
        readings = {}
        for i, step in enumerate(steps):
            if len(step.ways) > 1:
                readings[step.path] = self._read(steps, costs, taken, i)
        return readings

    def _steps(self) -> list[Step]:
        """All layers in order."""
        steps: list[Step] = []
        waiting = [""]
        while waiting:
            path = waiting.pop()
            step = self._step(path)
            if step is not None:
                steps.append(step)
            names = self._shapes.names_below(path)
            if self._shapes.is_list(path):
                names.sort(key=int)
            for name in reversed(names):
                if name:
                    waiting.append(f"{path}.{name}" if path else name)
        return steps

    def _step(self, path: str) -> Step | None:
        """A layer as a step; None if it has no weight of one or more channels."""
        shape = self._shapes.of(path)
        if shape is None or not shape or 0 in shape:
            return None
        if len(shape) == 1:
            return Step(path, shape, (Way(shape[0], shape[0]),))
        first, second = shape[:2]
        bias = self._shapes.vector(path)
        if len(shape) == 2:
            is_table = "emb" in path.rpartition(".")[2].lower()
            way = Way(first, second) if is_table else Way(second, first)
            return Step(path, shape, (way,))
        plain = Way(second, first)
        if bias is not None and bias != first:
            return Step(path, shape, (Way(first, bias, is_transposed=True),))
        step = Step(path, shape, (plain,))
        if not step.is_wide:
            return step
        if bias is None or first == second:
            return step._replace(ways=(plain, Way(first, second, True, _TRANSPOSED)))
        if second > 1 and first % second == 0:
            return step._replace(ways=(plain, Way(first, first, True, _REVERSE_GROUPS)))
        return step

    def _with_groups(self, steps: list[Step]) -> None:
        """Add the transposed convolutions in groups that give what the step after takes.

        Kernels of a picture's channels are hardly transposed ones where they begin the run.
        """
        for i, step in enumerate(steps):
            if len(step.ways) == 1 or self._shapes.vector(step.path) is not None:
                continue
            first, second = step.shape[:2]
            if first != second and second in _OF_PICTURES and self._may_begin(steps, i):
                steps[i] = step._replace(ways=step.ways[:1])
                continue
            ways = list(step.ways)
            if i + 1 < len(steps):
                for groups in range(2, min(first, _MOST_GROUPS) + 1):
                    if first % groups == 0 and _takes(steps[i + 1], groups * second):
                        ways.append(Way(first, groups * second, True, _REVERSE_GROUPS))
            if i == 0 and second in _OF_PICTURES:
                for k, way in enumerate(ways[1:], 1):
                    ways[k] = way._replace(cost=way.cost + _FROM_PICTURE)
            steps[i] = step._replace(ways=tuple(ways))

    def _may_begin(self, steps: list[Step], i: int) -> bool:
        """Whether kernels of a picture's channels may be the first ones, and nothing tells more.

        In the order of names they may be anywhere.
        """
        step = steps[i]
        if len(steps) == 1:
            return True
        if (
            i == 0
            or not self._shapes.is_by_name
            or self._shapes.is_list(step.path.rpartition(".")[0])
        ):
            return False
        taking = [one for one in steps if one.is_kernels and one.shape[1] == step.shape[1]]
        before = [way.outputs for way in steps[i - 1].ways if way.is_transposed]
        return len(taking) == 1 and step.shape[0] not in before

    def _costs(self, steps: list[Step]) -> tuple[list[list[int]], list[int]]:
        """The least costs of a run with each way of each step, and the ways of the best run."""
        before: list[list[int]] = []
        origins: list[list[int]] = []
        for i, step in enumerate(steps):
            before.append([])
            origins.append([])
            for way in step.ways:
                options = [0]
                if i > 0:
                    options = []
                    for k, earlier in enumerate(steps[i - 1].ways):
                        cost = self._cost(steps[i - 1], earlier, step, way)
                        options.append(before[i - 1][k] + cost)
                before[i].append(min(options) + way.cost)
                origins[i].append(options.index(min(options)))
        after = [[0] * len(step.ways) for step in steps]
        for i in range(len(steps) - 2, -1, -1):
            for k, way in enumerate(steps[i].ways):
                options = []
                for j, later in enumerate(steps[i + 1].ways):
                    cost = self._cost(steps[i], way, steps[i + 1], later)
                    options.append(after[i + 1][j] + cost + later.cost)
                after[i][k] = min(options)
        taken = [before[-1].index(min(before[-1]))]
        for i in range(len(steps) - 1, 0, -1):
            taken.append(origins[i][taken[-1]])
        taken.reverse()
        totals = []
        for one, other in zip(before, after, strict=True):
            totals.append([first + second for first, second in zip(one, other, strict=True)])
        return totals, taken

    def _cost(self, step: Step, way: Way, following: Step, after: Way) -> int:
        """What it costs that a layer takes what the one before gives."""
        given = way.outputs
        inputs = after.inputs
        if given == inputs:
            return 0
        if following.is_kernels and len(step.shape) == 2 and given % inputs == 0:
            return 0  # reshaped to a picture
        if len(following.shape) == 2 and step.is_kernels and given > 1 and inputs % given == 0:
            return 0  # a picture as one vector
        if following.is_kernels and not after.is_transposed:
            if divide(inputs, given, after.outputs):
                return _GROUPS
            if self._are_beside(step, way, following, after):
                return 0
        return _BREAK

    def _are_beside(self, step: Step, way: Way, following: Step, after: Way) -> bool:
        """Whether two convolutions of the same widths may take the same, side by side."""
        if way != after or not step.is_kernels:
            return False
        above = step.path.rpartition(".")[0]
        if above != following.path.rpartition(".")[0]:
            return False
        return not self._is_apart(step.path, following.path)

    def _is_apart(self, path: str, other: str) -> bool:
        """Whether something without weights is between two layers of a list."""
        if not self._shapes.is_list(path.rpartition(".")[0]):
            return False
        return int(other.rpartition(".")[2]) - int(path.rpartition(".")[2]) > 1

    def _read(self, steps: list[Step], costs: list[list[int]], taken: list[int], i: int) -> Reading:
        """How one step is read."""
        step = steps[i]
        chosen = step.ways[taken[i]]
        rest = [cost for k, cost in enumerate(costs[i]) if k != taken[i]]
        is_clear = min(rest) - costs[i][taken[i]] >= _CLEAR
        fits = self._fits(steps, taken, i, taken[i])
        is_loose = not self._shapes.is_list(step.path.rpartition(".")[0])
        if chosen.is_transposed and is_loose and not all(fits):
            return Reading(False, is_sure=False, is_open=True)
        if chosen.is_transposed:
            groups = chosen.outputs // step.shape[1]
            is_sure = is_clear and groups == 1 and self._is_in_list(steps, i)
            return Reading(True, is_sure, not is_clear, groups)
        if step.shape[0] == step.shape[1]:
            is_open = self._is_like_a_transposed(steps, taken, i)
            if not all(fits):
                for way, cost in zip(step.ways, costs[i], strict=True):
                    is_near = cost - costs[i][taken[i]] < _CLEAR
                    is_open = is_open or (is_near and way.outputs != chosen.outputs)
            return Reading(False, not is_open, is_open)
        others = self._fits(steps, taken, i, 1)
        of_picture = step.shape[1] in _OF_PICTURES and (i == 0 or not any(others))
        has_bias = self._shapes.vector(step.path) is not None
        is_open = not (is_clear or any(fits) or of_picture or has_bias)
        is_open = is_open or (not is_clear and self._has_transposed(steps, taken, i))
        return Reading(False, not is_open, is_open)

    def _fits(self, steps: list[Step], taken: list[int], i: int, way: int) -> list[bool]:
        """Whether a step, in one way, fits the steps before and after exactly."""
        own = steps[i].ways[way]
        found = []
        if i > 0:
            found.append(steps[i - 1].ways[taken[i - 1]].outputs == own.inputs)
        if i + 1 < len(steps):
            found.append(steps[i + 1].ways[taken[i + 1]].inputs == own.outputs)
        return found

    def _is_in_list(self, steps: list[Step], i: int) -> bool:
        """Whether a step and those right before and after it are in one list."""
        above = steps[i].path.rpartition(".")[0]
        if not self._shapes.is_list(above):
            return False
        beside = steps[max(i - 1, 0) : i + 2]
        return len(beside) > 1 and all(one.path.rpartition(".")[0] == above for one in beside)

    def _near(self, steps: list[Step], taken: list[int], i: int) -> list[int]:
        """The places of the convolutions that lead to a step, or it to them, without a break."""
        places = []
        for step in (-1, 1):
            at = i
            while 0 <= at + step < len(steps) and abs(at - i) < _NEAR:
                first, second = min(at, at + step), max(at, at + step)
                way, after = steps[first].ways[taken[first]], steps[second].ways[taken[second]]
                if self._cost(steps[first], way, steps[second], after) >= _BREAK:
                    break
                at += step
                if steps[at].is_kernels:
                    places.append(at)
        return places

    def _has_transposed(self, steps: list[Step], taken: list[int], i: int) -> bool:
        """Whether a step is in one chain with a transposed convolution."""
        near = self._near(steps, taken, i)
        return any(steps[at].ways[taken[at]].is_transposed for at in near)

    def _is_like_a_transposed(self, steps: list[Step], taken: list[int], i: int) -> bool:
        """Whether a square step is in one chain with a transposed one of the same places."""
        for at in self._near(steps, taken, i):
            way = steps[at].ways[taken[at]]
            if way.is_transposed and steps[at].shape[2:] == steps[i].shape[2:]:
                return True
        return False


def _takes(step: Step, channels: int) -> bool:
    """Whether a step takes so many channels, maybe in groups."""
    for way in step.ways:
        in_groups = not way.is_transposed and divide(way.inputs, channels, way.outputs)
        if way.inputs == channels or (step.is_kernels and in_groups):
            return True
    return False


def divide(each: int, inputs: int, outputs: int) -> bool:
    """Whether inputs and outputs divide into groups of so many inputs."""
    if inputs <= each or inputs % each != 0:
        return False
    return outputs % (inputs // each) == 0
