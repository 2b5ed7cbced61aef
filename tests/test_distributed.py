"""DDP over gloo: ranks bit-identical to each other, and equal to one process with the whole batches; work that they share."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.nn.parallel import DistributedDataParallel

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._core import smallest_angle
from lightning_hsu._engine.ahead import Ahead
from lightning_hsu._engine.sharing import divided
from lightning_hsu._neurons.placement import ReplicatedPlacement
from lightning_hsu.measures import (
    Covering,
    KoLeo,
    Polarization,
    ResultantLength,
    RieszEnergy,
    Sampled,
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
    ends = world(2).run(ranks.fit_sharing, make, callback, partial(ddp, **case.flags), case.trainer)
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
    ends = world(2).run(ranks.fit_sharing, make, callback, partial(ddp, **flags), {})
    assert same_bits(ends)
    alone = ranks.fit_alone_once(make, callback, {})
    assert max_difference(ends[0], alone) < TOLERANCE
    without = ranks.fit_alone_once(make, callback | {"coefficient": 0.0}, {})
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
    assert max_difference(ends[0], ranks.fit_alone_once(make, {"coefficient": 0.5}, {})) < TOLERANCE


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
    ends = world(2).run(ranks.fit_sharing, make, callback, ddp, {})
    assert same_bits(ends)
    # a search amplifies rounding: another of two holes about as deep, never another function
    assert max_difference(ends[0], ranks.fit_alone_once(make, callback, {})) < 1e-3


@pytest.mark.parametrize("run", [ranks.fit, ranks.fit_sharing])
def test_equal_neurons_part_along_the_same_direction_on_every_rank(run):
    make = partial(
        make_module, Automatic, sharding.network_with_equal_neurons, make_optimizer=ranks.sgd
    )
    callback = {"coefficient": 0.5}
    ends = world(2).run(run, make, callback, ddp, {})
    assert same_bits(ends)
    assert max_difference(ends[0], ranks.fit_alone_once(make, callback, {})) < TOLERANCE
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
    ("callback", "run", "messages"),
    [
        *(({"apply": mode}, ranks.fit_sharing, 2) for mode in apart),
        *(({"measure": measure}, ranks.fit_sharing, 2) for measure in (KoLeo(), Sampled(block=4))),
        ({"tolerance": 1e-9}, ranks.fit_sharing, 2),
        ({"apply": "loss"}, ranks.fit_sharing, 0),  # the whole penalty is in each rank's loss
        ({"measure": Covering()}, ranks.fit_sharing, 0),  # whose search is most of the work
        ({"share_work": False}, ranks.fit_sharing, 0),
        ({}, ranks.fit, 0),  # not worth a message
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_each_rank_sends_one_message_a_step_however_many_layers_there_are(callback, run, messages):
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    callback = {"coefficient": 0.5} | callback
    ends = world(2).run(run, make, callback, ddp, {})
    assert same_bits(ends)
    assert [end.messages for end in ends] == [6 * messages] * 2
    assert max_difference(ends[0], ranks.fit_alone_once(make, callback, {})) < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch uses what it warns of
def test_nothing_is_shared_by_ranks_with_weights_of_their_own():
    """Local SGD. (Lightning leaves the hook that does it to GPUs: here the weights stay the same.)"""
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    ends = world(2).run(ranks.fit_sharing, make, {"coefficient": 0.5}, local_sgd, {})
    assert [end.messages for end in ends] == [0, 0]
    assert same_bits(ends)


def local_sgd():
    subgroup, _ = distributed.new_subgroups(group_size=1)
    state = PostLocalSGDState(None, subgroup, start_localSGD_iter=1)
    return ddp(ddp_comm_state=state, ddp_comm_hook=post_localSGD_hook, model_averaging_period=100)


class TwoOptimizers(Manual):
    """One for the first layer, and one for the others, of one loss."""

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(models.mean_square(self.net(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [ranks.sgd(self.net[0].parameters()), ranks.sgd(self.net[1:].parameters())]


LOOPS = {
    "a frozen layer": (Automatic, models.partly_frozen_network, ranks.sgd, {}),
    "two optimizers": (TwoOptimizers, models.network, None, {}),
    "several strides": (Automatic, models.image_network, ranks.sgd, {}),
    "two evaluations a step": (Automatic, models.network, models.SharpnessAware, {}),
    "accumulation": (Automatic, models.network, ranks.sgd, {"accumulate_grad_batches": 2}),
    "float64": (Automatic, models.network, ranks.sgd, {"precision": "64-true"}),
    "an unused layer": (Automatic, detour, ranks.sgd, {}),
}


@pytest.mark.filterwarnings("ignore:the penalty has not reached layer 'net.5'")
@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize("name", LOOPS)
def test_layers_of_several_loops_are_shared(name, tolerance):
    kind, net, make_optimizer, settings = LOOPS[name]
    make = partial(make_module, kind, net, make_optimizer=make_optimizer)
    callback = {"coefficient": 0.5, "tolerance": tolerance}
    strategy = partial(ddp, find_unused_parameters=name == "an unused layer")
    ends = world(2).run(ranks.fit_sharing, make, callback, strategy, settings)
    assert same_bits(ends)
    assert ends[0].messages > 0
    assert max_difference(ends[0], ranks.fit_alone_once(make, callback, settings)) < TOLERANCE


@pytest.mark.parametrize(("tolerance", "most"), [(None, TOLERANCE), (0.05, 1e-3)])
def test_one_process_goes_on_from_the_checkpoint_of_two(tolerance, most, tmp_path):
    make = partial(make_module, Automatic, models.network, make_optimizer=ranks.sgd)
    callback = {"coefficient": 0.5, "tolerance": tolerance}
    path = tmp_path / "first.ckpt"
    world(2).run(first_epoch_sharing, make, callback, ddp, {}, path)
    resumed = ranks.fit_alone(make, callback, {}, ckpt_path=path)
    assert max_difference(resumed, ranks.fit_alone_once(make, callback, {})) < most


def first_epoch_sharing(*args):
    with ranks.shares_every_layer():
        ranks.fit_first_epoch(*args)


@dataclass(frozen=True)
class FailsOnOne(ResultantLength):
    """A measure that cannot be computed on rank 1, which has the smaller layer."""

    def penalty(self, x, state=None):
        if distributed.get_rank() == 1:
            raise ArithmeticError("no more")
        return super().penalty(x, state)


@dataclass(frozen=True)
class KernelFailsOnOne(RieszEnergy):
    """A kernel that cannot be computed on rank 1."""

    def kernel(self, q, p):
        if distributed.get_rank() == 1 and q.dim() == 3:  # of a Gram matrix
            raise ArithmeticError("no more")
        return super().kernel(q, p)


@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize("measure", [FailsOnOne(), KernelFailsOnOne()], ids=str)
def test_an_error_on_one_rank_is_told_on_the_others(measure, tolerance):
    """They do not wait for it."""
    first, second = world(2).run(errors_of_a_step, measure, tolerance)
    assert second == "ArithmeticError: no more"
    assert first.startswith("RuntimeError: rank 1 could not compute the penalty's gradient of its")
    assert first.endswith("share of the layers, '2': see its error")


def errors_of_a_step(measure, tolerance):
    net = nn.Sequential(nn.Linear(8, 14), nn.Tanh(), nn.Linear(14, 7))
    model = DistributedDataParallel(net)
    model(torch.randn(4, 8)).square().mean().backward()
    with ranks.shares_every_layer():
        regularizer = UniformityRegularizer(measure, tolerance=tolerance, head=None).attach(model)
        return ranks.error_of(regularizer.add_gradients, ranks.sgd(net.parameters()))


class Block(nn.Module):
    """The layers of a block of GPT-2, of that shape to one another."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out((q * k).tanh() * v)
        return x + self.down(self.up(x).tanh())


def train_blocks(mode, share_work, settings):
    torch.manual_seed(0)
    net, x = nn.Sequential(*(Block(160) for _ in range(4))), torch.randn(12, 160)
    rank, size, model = 0, 1, net
    if distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        model = DistributedDataParallel(net)
    regularizer = UniformityRegularizer(
        coefficient=0.5, head=None, share_work=share_work, **settings
    )
    return ranks.train(net, model, x[rank::size], regularizer.attach(model), mode)


@pytest.mark.parametrize(
    ("size", "mode", "settings"),
    [
        (2, "gradient", {}),
        (2, "decoupled", {}),
        (2, "gradient", {"tolerance": 0.05}),
        (4, "gradient", {}),
    ],
    ids=str,
)
def test_each_rank_does_its_part_of_the_work(size, mode, settings):
    alone = train_blocks(mode, True, settings)
    ends = world(size).run(train_blocks, mode, True, settings)
    assert same_bits(ends)
    assert max_difference(ends[0], alone) < TOLERANCE
    assert ends[0].messages > 0
    # The smallest layer of each block, 4 % of the work, is computed by all.
    assert max(end.work for end in ends) < 1.2 / size * alone.work
    assert sum(end.work for end in ends) < 1.2 * alone.work
    whole = world(size).run(train_blocks, mode, False, settings)
    assert [(end.messages, end.work) for end in whole] == [(0, alone.work)] * size
    assert max_difference(whole[0], alone) < TOLERANCE


def train_accumulating(tolerance, steps, *, ahead=False, touched=None, scaled=False):
    """Two micro-batches a step, of which DDP reduces the second; which layers each step has computed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 9), nn.Tanh(), nn.Linear(9, 70))
    x = torch.randn(24, 8)
    rank, size, model = 0, 1, net
    if distributed.is_initialized():
        rank, size = distributed.get_rank(), distributed.get_world_size()
        model = DistributedDataParallel(net)
    parts = x[rank::size].chunk(2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-3)
    computed = []
    with ranks.shares_every_layer():
        regularizer = UniformityRegularizer(coefficient=0.5, head=None, tolerance=tolerance)
        regularizer.attach(model)
        for _ in range(steps):
            optimizer.zero_grad()
            with model.no_sync() if size > 1 else nullcontext():
                model(parts[0]).square().mean().backward()
            model(parts[1]).square().mean().backward()
            regularizer.add_gradients(optimizer)
            optimizer.step()
            if ahead:
                regularizer.look_ahead(optimizer)
            with torch.no_grad():
                if rank == touched:
                    net[0].weight.mul_(1.0)
                if scaled:
                    net[0].weight[3].mul_(0.9)
            computed.append(sorted(regularizer.state.deltas.computed))
    return End(ranks.whole_tensors(net)), computed


@pytest.mark.parametrize("tolerance", [None, 0.1, 0.3])
def test_layers_that_fall_due_at_different_steps_are_shared(tolerance):
    alone, schedule = train_accumulating(tolerance, 24)
    answers = world(2).run(train_accumulating, tolerance, 24)
    assert same_bits([end for end, _ in answers])
    assert [computed for _, computed in answers] == [schedule] * 2
    assert max_difference(answers[0][0], alone) < TOLERANCE
    if tolerance is not None:
        assert len({tuple(names) for names in schedule}) > 2


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_gradients_that_are_computed_ahead_are_shared(tolerance):
    """The same steps; where all is computed ahead there is nothing left to send at a step."""
    alone, _ = train_accumulating(tolerance, 6)
    answers = world(2).run(train_ahead, tolerance, 6)
    assert same_bits([end for end, _ in answers])
    assert max_difference(answers[0][0], alone) < TOLERANCE
    for _, messages in answers:
        ahead, within = messages["begin"], messages["add"]
        assert ahead > 0
        assert within == 2  # the first step


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_weights_touched_on_one_rank_alone_keep_no_other_waiting(tolerance):
    """As by an evaluation there, with other weights that it takes back."""
    alone, schedule = train_accumulating(tolerance, 6)
    answers = world(2).run(train_touched, tolerance, 6)
    assert same_bits([end for end, _ in answers])
    for end, computed in answers:
        assert computed == schedule
        assert max_difference(end, alone) < TOLERANCE


@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_weights_changed_on_all_ranks_after_looking_ahead_are_seen(tolerance):
    """As by clipping, in a row of neurons alone."""
    alone, _ = train_accumulating(tolerance, 6, ahead=True, scaled=True)
    without, _ = train_accumulating(tolerance, 6, ahead=True)
    answers = world(2).run(train_scaled, tolerance, 6)
    assert same_bits([end for end, _ in answers])
    assert max_difference(answers[0][0], alone) < TOLERANCE
    assert max_difference(answers[0][0], without) > 10 * TOLERANCE


def train_touched(tolerance, steps):
    return train_accumulating(tolerance, steps, ahead=True, touched=1)


def train_scaled(tolerance, steps):
    return train_accumulating(tolerance, steps, ahead=True, scaled=True)


def train_ahead(tolerance, steps):
    """The end, and how many messages were sent ahead and within a step."""
    messages = {"begin": 0, "add": 0}
    where = ["add"]
    begin, send = Ahead.begin, ReplicatedPlacement.send

    def noted(*args, **settings):
        where.append("begin")
        begin(*args, **settings)
        where.pop()

    def sent(placement, some, **settings):
        messages[where[-1]] += len(some)
        return send(placement, some, **settings)

    with (
        mock.patch.object(Ahead, "begin", noted),
        mock.patch.object(ReplicatedPlacement, "send", sent),
    ):
        end, _ = train_accumulating(tolerance, steps, ahead=True)
    return end, messages


def test_layers_are_divided_by_their_work():
    assert divided((4.0, 1.0, 3.0, 2.0, 2.0), 2, 0.0) == (0, 1, 1, 1, 0)
    assert divided((4.0, 4.0), 3, 4.0) == (0, 1)
    assert divided((4.0, 1.0), 2, 1.5) == ()  # the busiest is spared too little
    assert divided((4.0,), 2, 1.0) == ()
