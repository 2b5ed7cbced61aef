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
from lightning_hsu._neurons.rules import class_rule


class Group:
    """A process group as far as this process looks at it."""


def test_a_model_on_one_process_is_whole():
    placement = placement_of(nn.Linear(3, 4), split_above=0)
    assert type(placement) is Placement
    assert (placement.rank, placement.size, placement.split_above) == (0, 1, None)
    assert not placement.splits(1_000_000)
    parts = [torch.ones(2), torch.zeros(3)]
    assert placement.sum_over_ranks(parts) == parts


def test_a_group_has_replicas():
    placement = placement_of(nn.Linear(3, 4), group=Group(), split_above=8)
    assert type(placement) is ReplicatedPlacement
    assert placement.split_above == 8
    assert not placement.splits(7)


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
