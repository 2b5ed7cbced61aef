"""How weights are placed over ranks: which placement a model has, and what it is on one process."""

import pytest
import torch
from torch import nn

from lightning_hsu._neurons.placement import (
    DTensorPlacement,
    FlatPlacement,
    Placement,
    ReplicatedPlacement,
    known_strategies,
    placement_for_strategy,
    placement_of,
)
from lightning_hsu._neurons.placement.base import Message
from lightning_hsu._neurons.rules import class_rule


class Group:
    """A process group as far as this process looks at it."""

    def __init__(self, size):
        self.size = lambda: size


def test_a_model_on_one_process_is_whole():
    placement = placement_of(nn.Linear(3, 4))
    assert type(placement) is Placement
    assert (placement.rank, placement.size, placement.shares_work) == (0, 1, False)
    assert placement.send([Message(0, torch.ones(2))]) == []


def test_a_group_has_replicas():
    for size, share_work, shares_work in ((2, True, True), (2, False, False), (1, True, False)):
        placement = placement_of(nn.Linear(3, 4), group=Group(size), share_work=share_work)
        assert type(placement) is ReplicatedPlacement
        assert placement.shares_work == shares_work


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("SingleDeviceStrategy", Placement),
        ("DDPStrategy", ReplicatedPlacement),
        ("FSDPStrategy", FlatPlacement),
        ("ModelParallelStrategy", DTensorPlacement),
        ("DeepSpeedStrategy", None),
    ],
)
def test_strategies(strategy, kind):
    assert placement_for_strategy(strategy) is kind
    assert (strategy in known_strategies()) == (kind is not None)


def test_norm_of_several_tensors():
    parts = [torch.full((4,), 2.0, dtype=torch.bfloat16), torch.full((9,), 3.0)]
    norm = Placement().norm(parts)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx((16 + 81) ** 0.5)


def test_parameters_behind_neurons():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    behind = Placement().parameters_behind(layer, class_rule, "")
    weights = layer.parametrizations.weight
    assert [id(p) for p in behind] == [id(weights.original0), id(weights.original1)]
