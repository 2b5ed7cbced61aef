"""DDP over gloo: ranks bit-identical to each other, and equal to one process with the whole batches; work that they share."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._core import smallest_angle
from lightning_hsu._neurons.placement import ReplicatedPlacement
from lightning_hsu.measures import (
    Covering,
    GaussianPotential,
    KoLeo,
    Polarization,
    RieszEnergy,
    SlicedWasserstein,
)
from lightning_hsu.projections import AnglePreserving, Projected, RandomProjection
from tests import models, plain, ranks, sharding
from tests.compatibility import MODES
from tests.models import Automatic, Manual, trainer, uniformity
from tests.processes import world
from tests.ranks import End, make_module, max_difference, same_bits

TOLERANCE = 1e-6  # measured: 2e-7

pytestmark = pytest.mark.slow
apart = ("gradient", "decoupled")
ddp = partial(DDPStrategy, process_group_backend="gloo")


@dataclass(frozen=True)
class Case:
    """One way to train on two ranks.

    Args:
        flags: Of DDP.
        kind: The LightningModule.
        net: Makes the network.
        trainer: Settings of the Trainer; ``loop`` are those of the plain loop.
        coefficient: A number or a share.
        modes: Those that are tested.
    """

    flags: dict[str, Any] = field(default_factory=dict)
    kind: Callable[..., Any] = Automatic
    net: Callable[[], nn.Module] = models.network
    trainer: dict[str, Any] = field(default_factory=dict)
    loop: dict[str, Any] = field(default_factory=dict)
    coefficient: Any = 0.5
    modes: tuple[str, ...] = MODES


def detour():
    return models.Detour(*models.network())


CASES = {
    "default": Case(),
    "static graph": Case({"static_graph": True}),
    "bucket views": Case({"gradient_as_bucket_view": True}),
    "unused parameters": Case({"find_unused_parameters": True}, net=detour, modes=apart),
    "unused parameters, all used": Case({"find_unused_parameters": True}),
    "accumulation, bucket views": Case(
        {"gradient_as_bucket_view": True},
        trainer={"accumulate_grad_batches": 2},
        loop={"accumulate": 2},
    ),
    # not with static_graph: there torch 2.4 does not reduce the gradients of manual_backward, callback or not
    "manual": Case(kind=Manual, modes=apart),
    "Share": Case(coefficient=Share(0.3), modes=apart),
    "weight_norm": Case(net=models.weight_normed_network),
}


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, case in CASES.items() for mode in case.modes]
)
@pytest.mark.filterwarnings("ignore:the penalty has not reached layer 'net.5'")
def test_two_ranks_equal_one_process_with_the_doubled_batch(name, mode):
    case = CASES[name]
    make = partial(make_module, case.kind, case.net, make_optimizer=ranks.sgd)
    callback = {"coefficient": case.coefficient, "apply": mode}
    ends = world(2).run(ranks.fit, make, callback, partial(ddp, **case.flags), case.trainer)
    assert same_bits(ends)
    torch.manual_seed(0)
    alone = make()
    without = copy.deepcopy(alone)
    for module, kind in ((alone, mode), (without, "none")):
        penalty = plain.Penalty(
            plain.layers(module.net), kind, lambda *_: case.coefficient, **case.loop
        )
        plain.train(module, ranks.data(), penalty, **case.loop)
    assert max_difference(ends[0], End(ranks.whole_tensors(alone))) < TOLERANCE
    assert max_difference(ends[0], End(ranks.whole_tensors(without))) > 10 * TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_changes_under_way_is_followed_on_both_ranks(mode):
    make = partial(make_module, sharding.Changing, models.network, make_optimizer=ranks.sgd)
    callback = {"coefficient": 0.5, "apply": mode}
    flags = {"find_unused_parameters": True}  # the frozen layer
    ends = world(2).run(ranks.fit, make, callback, partial(ddp, **flags), {})
    assert same_bits(ends)
    alone = ranks.fit_alone(make, callback, {})
    assert max_difference(ends[0], alone) < TOLERANCE
    without = ranks.fit_alone(make, callback | {"coefficient": 0.0}, {})
    assert max_difference(ends[0], without) > 10 * TOLERANCE


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # a process forks that has threads
def test_the_same_where_lightning_starts_the_processes(tmp_path):
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    torch.manual_seed(0)
    settings = {
        "strategy": ddp(start_method="spawn", timeout=timedelta(seconds=60)),
        "use_distributed_sampler": False,
    }
    fit = trainer(uniformity(coefficient=0.5), ranks.Save(tmp_path), devices=2, **settings)
    fit.fit(make(), datamodule=ranks.Shared())
    ends = [End(torch.load(tmp_path / f"{rank}.pt", weights_only=True)) for rank in range(2)]
    assert same_bits(ends)
    assert max_difference(ends[0], ranks.fit_alone(make, {"coefficient": 0.5}, {})) < TOLERANCE


@pytest.mark.parametrize(
    ("measure", "mode"),
    [
        *((Covering(), mode) for mode in MODES),
        (Projected(Polarization(s=1), RandomProjection(dim=5)), "gradient"),
        (Projected(projection=AnglePreserving(dim=4)), "decoupled"),
        (Projected(projection=RandomProjection(dim=5)), "loss"),
        (SlicedWasserstein(), "gradient"),
    ],
    ids=str,
)
def test_what_is_searched_or_drawn_is_the_same_on_every_rank(measure, mode):
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    callback = {"measure": measure, "coefficient": 0.5, "apply": mode}
    ends = world(2).run(ranks.fit, make, callback, ddp, {})
    assert same_bits(ends)
    # a search amplifies rounding: another of two holes about as deep, never another function
    assert max_difference(ends[0], ranks.fit_alone(make, callback, {})) < 1e-3


@pytest.mark.parametrize("split_above", [0, None])
def test_equal_neurons_part_along_the_same_direction_on_every_rank(split_above):
    make = partial(
        make_module, Automatic, sharding.network_with_equal_neurons, make_optimizer=ranks.sgd
    )
    callback = {"coefficient": 0.5, "split_above": split_above}
    ends = world(2).run(ranks.fit, make, callback, ddp, {})
    assert same_bits(ends)
    assert max_difference(ends[0], ranks.fit_alone(make, callback, {})) < TOLERANCE
    assert float(smallest_angle(ends[0].parameters["net.1.weight"])) > 0.01


def test_a_layer_that_ddp_has_closed_is_named_on_every_rank():
    make = partial(make_module, Automatic, detour, make_optimizer=ranks.sgd)
    strategy = partial(ddp, find_unused_parameters=True)
    for said in world(2).run(ranks.error_of, ranks.fit, make, {"apply": "loss"}, strategy, {}):
        assert said.startswith(
            "RuntimeError: layer 'net.5' (1, 12, 32) took no part in this batch's loss"
        ), said
        assert "apply='gradient', or exclude='net.5'" in said


@pytest.mark.parametrize(
    ("split_above", "measure", "reductions", "mode"),
    [
        *((0, None, 6, mode) for mode in apart),
        *((None, None, 0, mode) for mode in apart),
        (9, None, 6, "gradient"),
        (2048, None, 0, "gradient"),
        (0, RieszEnergy(s=1), 6, "gradient"),
        (0, GaussianPotential(), 0, "gradient"),
        (0, KoLeo(), 0, "gradient"),
        (0, Covering(), 0, "gradient"),
        (0, None, 0, "loss"),
    ],
    ids=str,
)
def test_large_layers_are_split_over_the_ranks_in_one_reduction_a_step(
    split_above, measure, reductions, mode
):
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    callback = {"coefficient": 0.5, "apply": mode, "measure": measure}
    ends = world(2).run(ranks.fit, make, {"split_above": split_above, **callback}, ddp, {})
    assert same_bits(ends)
    assert [end.reductions for end in ends] == [reductions] * 2
    assert max_difference(ends[0], ranks.fit_alone(make, callback, {})) < TOLERANCE


def plain_network(neurons):
    return nn.Sequential(nn.Linear(64, neurons), nn.Tanh(), nn.Linear(neurons, neurons, bias=False))


def train_split(neurons, mode, split):
    torch.manual_seed(0)
    net, x = plain_network(neurons), torch.randn(12, 64)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    placement = ReplicatedPlacement(distributed.group.WORLD, 0 if split else None)
    regularizer = UniformityRegularizer(coefficient=0.5).attach(net, placement=placement)
    return ranks.train(net, DistributedDataParallel(net), x[rank::size], regularizer, mode)


def train_alone(neurons, mode):
    torch.manual_seed(0)
    net, x = plain_network(neurons), torch.randn(12, 64)
    return ranks.train(net, net, x, UniformityRegularizer(coefficient=0.5).attach(net), mode)


@pytest.mark.parametrize("mode", apart)
@pytest.mark.parametrize(("size", "neurons"), [(2, 600), (4, 1000)])
def test_each_rank_does_its_part_of_the_work(size, neurons, mode):
    alone = train_alone(neurons, mode)
    for split, reductions, work in ((True, 3, 1 / size), (False, 0, 1)):
        ends = world(size).run(train_split, neurons, mode, split)
        assert same_bits(ends)
        assert max_difference(ends[0], alone) < TOLERANCE
        assert [end.reductions for end in ends] == [reductions] * size
        assert all(end.work == pytest.approx(alone.work * work, rel=0.1) for end in ends)
