"""What a user sees of a run before it is a tenth through: each layer's ratio and gradient share."""

from __future__ import annotations

import torch
from torch import Tensor

from evidence.methods import HALF_MHE
from evidence.networks import Networks, Side
from lightning_hsu.reference import uniformity_ratio

STEPS = 10
"""Over how many steps the norms of gradients are summed."""


class Early:
    """Watches the last steps of the first tenth of a training.

    Args:
        networks: Whose hidden layers are watched.
        steps: Of the whole training.
    """

    def __init__(self, networks: Networks, steps: int) -> None:
        self._sides: list[Side] = list(networks.hidden)
        self._end = max(steps // 10, 1)
        self._step = 0
        self._gradients: list[Tensor] = []  # the task's, of this step
        shape = (len(self._sides), networks.trials, networks.seeds)
        self._task = torch.zeros(shape)
        self._penalty = torch.zeros(shape)
        self.ratio = torch.zeros(shape)
        """Energy over that of random neurons, half space, s = 2: (layers, trials, seeds)."""

    @property
    def share(self) -> Tensor:
        """Norm of the penalty's gradient over the task's, of the same shape."""
        return self._penalty / self._task

    def before_penalty(self) -> None:
        """Look at the gradients of the task."""
        self._step += 1
        self._gradients = []
        if self._end - STEPS < self._step <= self._end:
            self._gradients = [side.gradients() for side in self._sides]
        if self._step == self._end:
            self.ratio = torch.stack([ratio_of(side) for side in self._sides])

    def after_penalty(self) -> None:
        """Look at what the penalty has added to them."""
        for i, task in enumerate(self._gradients):
            self._task[i] += _norm(task)
            self._penalty[i] += _norm(self._sides[i].gradients() - task)


@torch.no_grad()
def ratio_of(side: Side) -> Tensor:
    """Each network's half-space energy over that of random neurons, s = 2, (trials, seeds)."""
    weight = side.joined("weight")
    found = uniformity_ratio(HALF_MHE, weight.flatten(3).flatten(0, 1).nan_to_num())
    return found.view(weight.shape[:2]).T


def _norm(gradients: Tensor) -> Tensor:
    """Each network's norm, (trials, seeds)."""
    return gradients.flatten(2).norm(dim=-1).T
