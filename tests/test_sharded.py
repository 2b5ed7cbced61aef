"""Weights that ranks share: FSDP2, tensor parallel, both at once, and FSDP1 train as one process does with whole batches."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu._engine.optimizer_steps import OptimizerSteps
from lightning_hsu.measures import Covering, KoLeo, Polarization, SlicedWasserstein
from lightning_hsu.projections import AnglePreserving, Projected, RandomProjection
from tests import models, ranks, sharding
from tests.compatibility import MODES
from tests.models import Automatic, Manual
from tests.processes import world
from tests.ranks import make_module, max_difference
from tests.sharding import FSDPOnTheCPU, Tied, Tokens, Untied, layer_by_layer, needs_fsdp2

TOLERANCE = 1e-6  # measured: 4e-7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:FSDP2-wrapped module .* returned a view tensor",  # torch's, of tensor parallel layers
        "ignore:DTensor random operators may not have complete support",  # torch 2.4's
    ),
]


def rising(step):
    return 0.1 * step


@dataclass(frozen=True)
class Case:
    """One way to cut a model and to train it.

    Args:
        name: What the test calls it.
        cut: Takes the network and the mesh.
        mesh: Ranks that are data parallel, and that are tensor parallel.
        net: Makes the network.
        callback: Settings of the callback.
        trainer: Settings of the Trainer.
        optimizer: Takes parameters.
        manual: Whether optimisation is manual.
        modes: Those that are tested.
        tolerance: What the parameters may differ by.
    """

    name: str
    cut: Callable[..., None] = layer_by_layer
    mesh: tuple[int, int] = (2, 1)
    net: Callable[[], nn.Module] = models.network
    callback: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., Any] = ranks.sgd
    manual: bool = False
    modes: tuple[str, ...] = MODES
    tolerance: float = TOLERANCE

    @property
    def strategy(self):
        """What makes the strategy."""
        data, tensor = self.mesh
        sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor}
        return partial(ModelParallelStrategy, process_group_backend="gloo", **sizes)

    def module(self, parallel):
        """What makes the module."""
        if parallel:
            return partial(
                make_module,
                sharding.ParallelManual if self.manual else sharding.Parallel,
                self.net,
                cut=self.cut,
                make_optimizer=self.optimizer,
            )
        return partial(
            make_module,
            Manual if self.manual else Automatic,
            self.net,
            make_optimizer=self.optimizer,
        )


@dataclass(frozen=True)
class Flat(Case):
    """The same with FSDP1, of which ``pieces`` are settings."""

    pieces: dict[str, Any] = field(default_factory=dict)
    modes: tuple[str, ...] = ("gradient", "decoupled")

    @property
    def strategy(self):
        return partial(FSDPOnTheCPU, **self.pieces)

    def module(self, parallel):
        return partial(make_module, Automatic, self.net, make_optimizer=self.optimizer)


tensors = {"cut": sharding.columns_and_rows, "mesh": (1, 2)}
# Four processes take long; epochs in which they go on are the other cases'.
squares = {"cut": sharding.both_ways, "mesh": (2, 2), "trainer": {"max_epochs": 1}}
three = {"mesh": (3, 1)}
apart, one = ("gradient", "decoupled"), ("gradient",)
share = {"callback": {"coefficient": Share(0.3)}, "modes": apart}
named = {"callback": {"include": "net"}}  # embeddings are measured only where they are asked for
shared_by_name = {"callback": {"include": "net", "coefficient": Share(0.3)}, "modes": apart}
searched = {
    "tolerance": 1e-4,
    "modes": one,
}  # a search, or a steep energy in few dimensions, amplifies rounding: 2e-5
pieces = {"pieces": {"auto_wrap_policy": {nn.Linear, nn.Conv2d}}}

CASES = [
    Case("layer by layer"),
    Case("as a whole", sharding.as_a_whole),
    Case("three ranks", **three, modes=apart),
    Case("tensor parallel", **tensors),
    Case("both ways", **squares),
    Case("uneven shards", net=sharding.uneven_network),
    Case("uneven shards, tensor parallel", sharding.rows_alone, (1, 3), sharding.uneven_network),
    Case("empty shards", **three, net=sharding.uneven_network),
    Case(
        "equal neurons, limited",
        net=sharding.network_with_equal_neurons,
        trainer={"log_every_n_steps": 1},
    ),
    Case("tokens", net=Tokens, **named),
    Case("tokens, three ranks, Share", **three, net=Tokens, **shared_by_name),
    Case("tied", sharding.body_apart, net=Tied, **named),
    Case("vocabulary over ranks", sharding.vocabulary, (1, 2), Untied, **named),
    Case("weight_norm", net=models.weight_normed_network),
    Case("frozen", net=models.partly_frozen_network, modes=apart),
    Case("frozen weights, biases train", net=models.network_of_trained_biases, modes=apart),
    Case("manual", manual=True, modes=apart),
    Case("Covering", callback={"measure": Covering()}),
    Case("Polarization", callback={"measure": Polarization(s=1)}, **searched),
    Case(
        "AnglePreserving",
        callback={"measure": Projected(projection=AnglePreserving(dim=4))},
        modes=apart,
    ),
    Case(
        "RandomProjection",
        callback={"measure": Projected(projection=RandomProjection(dim=4))},
        **searched,
    ),
    Case("SlicedWasserstein", callback={"measure": SlicedWasserstein()}, modes=one),
    Case("KoLeo", callback={"measure": KoLeo()}, modes=apart),
    Case("tensor parallel, Covering", **tensors, callback={"measure": Covering()}, modes=one),
    Case("tensor parallel, KoLeo", **tensors, callback={"measure": KoLeo()}, modes=one),
    Case("Share", **share),
    Case("Share, tensor parallel", **tensors, **share),
    Case("Share, both ways", **squares, **share),
    Case("accumulation", trainer={"accumulate_grad_batches": 2}),
    Case("clipping", trainer={"gradient_clip_val": 0.3}),
    Case("AdamW, every second step", callback={"every_n_steps": 2}, optimizer=ranks.adamw),
    Case(
        "both ways, AdamW, schedule",
        **squares,
        callback={"coefficient": rising},
        optimizer=ranks.adamw,
    ),
    Flat("flat"),
    Flat("flat pieces", **pieces),
    Flat("flat, only gradients", pieces={"sharding_strategy": "SHARD_GRAD_OP"}, modes=one),
    Flat("flat, uneven", net=sharding.uneven_network),
    Flat("flat, tokens, Share", net=Tokens, **shared_by_name),
    Flat("flat, tied", net=Tied, **named),
    Flat("flat, frozen", net=models.partly_frozen_network, modes=one),
    Flat("flat pieces, weight_norm", net=models.weight_normed_network, **pieces),
    Flat(
        "flat pieces, equal neurons", net=sharding.network_with_equal_neurons, **pieces, modes=one
    ),
    Flat("flat pieces, Share", **pieces, **share),
    Flat("flat, Covering", callback={"measure": Covering()}, modes=one),
    Flat("flat pieces, accumulation", **pieces, trainer={"accumulate_grad_batches": 2}, modes=one),
    # Lightning does not clip flat pieces by norm
    Flat(
        "flat, clipping",
        trainer={"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        modes=one,
    ),
    Flat(
        "flat pieces, every second step, schedule",
        **pieces,
        callback={"every_n_steps": 2, "coefficient": rising},
    ),
]


def fsdp2(case):
    return needs_fsdp2 if case.mesh[0] > 1 and not isinstance(case, Flat) else ()


def as_read_by_ranks(*, is_flat):
    """Within the block the steps of optimizers with the state of flat pieces are not read from it."""
    if is_flat:
        return mock.patch.object(OptimizerSteps, "_state_of", return_value={})
    return nullcontext()


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, mode, marks=fsdp2(case)) for case in CASES for mode in case.modes],
    ids=lambda part: getattr(part, "name", part),
)
def test_ranks_train_as_one_process_does(case, mode):
    callback = {"coefficient": 0.5, "apply": mode, **case.callback}
    ends = world(math.prod(case.mesh)).run(
        ranks.fit, case.module(True), callback, case.strategy, case.trainer
    )
    is_flat = isinstance(case, Flat)
    with as_read_by_ranks(is_flat=is_flat):
        alone = ranks.fit_alone_once(case.module(False), callback, case.trainer, is_flat)
    assert_all_end_as(alone, ends, case.tolerance)


def assert_all_end_as(alone, ends, tolerance=TOLERANCE):
    """In parameters, and in what was logged."""
    for end in ends:
        assert max_difference(end, ends[0]) == 0
        assert max_difference(end, alone) < tolerance
        assert end.rows.keys() == alone.rows.keys()
        for step, row in alone.rows.items():
            assert end.rows[step] == pytest.approx(row, rel=1e-3, abs=1e-6, nan_ok=True), step


@needs_fsdp2
@pytest.mark.parametrize("distributed_checkpoint", [True, False], ids=["a folder", "a file"])
@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 1)])
@pytest.mark.filterwarnings(
    "ignore::UserWarning:torch.*", "ignore::FutureWarning"
)  # torch's, of what Lightning calls
def test_resumed_on_another_number_of_ranks(first, second, distributed_checkpoint, tmp_path):
    callback, path = {"apply": "gradient", **carried}, tmp_path / "checkpoint"
    for size, run in ((first, ranks.fit_first_epoch), (second, ranks.fit_from)):
        case = Case("", mesh=(size, 1))
        strategy = partial(case.strategy, save_distributed_checkpoint=distributed_checkpoint)
        ends = world(size).run(run, case.module(True), callback, strategy, {}, path)
    alone = ranks.fit_alone(CASES[0].module(False), callback, {})
    for end in ends:
        assert max_difference(end, alone) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cut", "mesh"),
    [
        pytest.param(sharding.as_a_whole, (2, 1), marks=needs_fsdp2),
        (sharding.rows_of_a_layer, (1, 2)),
    ],
    ids=["FSDP2", "tensor parallel"],
)
def test_layers_that_are_replaced_under_way_are_followed(cut, mesh, mode):
    case, callback = Case("", cut, mesh), {"coefficient": 0.5, "apply": mode}
    make = partial(
        make_module,
        sharding.RebuiltParallel,
        case.net,
        cut=case.cut,
        make_optimizer=case.optimizer,
    )
    ends = world(2).run(ranks.fit, make, callback, case.strategy, {})
    alone = partial(make_module, sharding.RebuiltAlone, case.net, make_optimizer=case.optimizer)
    assert_all_end_as(ranks.fit_alone(alone, callback, {}), ends)


def add_to_sharded_loss():
    """A loss as loss_parallel leaves it."""
    net = plain_network(8)
    regularizer = UniformityRegularizer(head=None).attach(net)
    loss = sharding.replicated(torch.ones(()), init_device_mesh("cpu", (2,)))
    regularizer.add_to_loss(loss, torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_loss_over_ranks_is_refused_with_the_way_out():
    for said in world(2).run(ranks.error_of, add_to_sharded_loss):
        assert said.startswith("NotImplementedError: the loss is a DTensor")
        assert "full_tensor()" in said


@needs_fsdp2
@pytest.mark.parametrize("mode", MODES)
def test_validation_in_between_changes_nothing(mode):
    case, callback = Case("", sharding.as_a_whole), {"coefficient": 0.5, "apply": mode}
    make = partial(
        make_module, sharding.Validated, case.net, cut=case.cut, make_optimizer=case.optimizer
    )
    ends = world(2).run(
        partial(ranks.fit, datamodule=None),
        make,
        callback,
        case.strategy,
        {"val_check_interval": 2},
    )
    assert_all_end_as(ranks.fit_alone(case.module(False), callback, {}), ends)


@pytest.mark.parametrize(
    ("kind", "settings", "mode", "error"),
    [
        (
            sharding.WithFlatOptimizer,
            {"use_orig_params": False},
            "gradient",
            ["NotImplementedError", "use_orig_params=True"],
        ),
        (
            Automatic,
            {},
            "loss",
            ["NotImplementedError", "FSDPOnTheCPU", "apply='gradient'", "ModelParallelStrategy"],
        ),
    ],
    ids=["without the original parameters", "loss"],
)
def test_what_flat_pieces_cannot_do_is_refused_on_every_rank(kind, settings, mode, error):
    make = partial(make_module, kind, models.network, make_optimizer=ranks.sgd)
    for said in world(2).run(
        ranks.error_of, ranks.fit, make, {"apply": mode}, partial(FSDPOnTheCPU, **settings), {}
    ):
        assert all(part in said for part in error), said


carried = {"coefficient": {"net.0": rising, "*": Share(0.3)}, "measure": Covering()}


@pytest.mark.filterwarnings(
    "ignore::UserWarning:torch.*", "ignore::FutureWarning"
)  # torch's, of what Lightning calls
@pytest.mark.parametrize("mode", apart)
@pytest.mark.parametrize(
    ("make", "strategy"),
    [
        pytest.param(
            CASES[0].module(True),
            partial(CASES[0].strategy, save_distributed_checkpoint=True),
            marks=needs_fsdp2,
        ),
        pytest.param(
            CASES[0].module(True),
            partial(CASES[0].strategy, save_distributed_checkpoint=False),
            marks=needs_fsdp2,
        ),
        (CASES[0].module(False), partial(FSDPOnTheCPU, state_dict_type="sharded")),
    ],
    ids=["FSDP2, a folder", "FSDP2, a file", "FSDP1"],
)
def test_a_resumed_fit_goes_on_where_it_was(make, strategy, mode, tmp_path):
    callback = {"apply": mode, **carried}
    ends = world(2).run(ranks.fit_in_two, make, callback, strategy, {}, tmp_path / "checkpoint")
    with as_read_by_ranks(is_flat=strategy.func is FSDPOnTheCPU):
        alone = ranks.fit_alone(CASES[0].module(False), callback, {})
    for end in ends:
        assert max_difference(end, alone) < TOLERANCE


@pytest.mark.filterwarnings(
    "ignore::UserWarning:torch.*", "ignore::FutureWarning"
)  # torch's, of what Lightning calls
@pytest.mark.parametrize("mode", apart)
def test_flat_pieces_that_nothing_was_applied_to_are_no_alarm(mode, tmp_path):
    """Resumed after three of six steps; the penalty is applied before the first and would be before the eighth."""
    callback = {"apply": mode, "coefficient": 0.5, "every_n_steps": 7}
    make, strategy = CASES[0].module(False), partial(FSDPOnTheCPU, state_dict_type="sharded")
    ends = world(2).run(ranks.fit_in_two, make, callback, strategy, {}, tmp_path / "checkpoint")
    alone = ranks.fit_alone(make, callback, {})
    for end in ends:
        assert max_difference(end, alone) < TOLERANCE


@needs_fsdp2
@pytest.mark.parametrize(
    ("cut", "settings"),
    [
        (sharding.in_bfloat16, {}),
        (sharding.in_bfloat16_but_for_the_head, {}),
        (layer_by_layer, {"precision": "bf16-mixed"}),
    ],
    ids=["policy", "policy, the head with the root", "autocast"],
)
@pytest.mark.parametrize("mode", ["gradient", "loss"])
def test_the_penalty_is_in_float32_where_the_task_is_computed_in_bfloat16(cut, settings, mode):
    """Its own effect on one step: the task's changes with every rounding."""
    ends, settings = [], {"max_steps": 1, **settings}
    for coefficient in (0.0, 0.5):
        case = Case("", cut)
        callback = {"coefficient": coefficient, "apply": mode}
        sharded = world(2).run(ranks.fit, case.module(True), callback, case.strategy, settings)[0]
        ends.append((sharded, ranks.fit_alone(case.module(False), callback, {"max_steps": 1})))
    for name in ends[0][0].parameters:
        found, expected = (
            ends[1][i].parameters[name] - ends[0][i].parameters[name] for i in range(2)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert max_difference(ends[0][0], ends[1][0]) > 1e-3


def plain_network(neurons=600):
    return nn.Sequential(nn.Linear(64, neurons), nn.Tanh(), nn.Linear(neurons, 4, bias=False))


def train_sharded(shape, mode):
    """FSDP2 without Lightning; on a mesh of two dimensions the first replicates."""
    torch.manual_seed(0)
    net, x = plain_network(), torch.randn(12, 64)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for part in (net[0], net[2], net):
        sharding.fully_shard(part, mesh=mesh)
    regularizer = UniformityRegularizer(coefficient=0.5, head=None).attach(net)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    return ranks.train(net, net, x[rank::size], regularizer, mode)


def train_alone(mode):
    torch.manual_seed(0)
    net, x = plain_network(), torch.randn(12, 64)
    return ranks.train(
        net, net, x, UniformityRegularizer(coefficient=0.5, head=None).attach(net), mode
    )


@needs_fsdp2
@pytest.mark.parametrize("mode", apart)
@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_each_rank_computes_its_own_rows_only(shape, mode):
    ends = world(math.prod(shape)).run(train_sharded, shape, mode)
    alone = train_alone(mode)
    for end in ends:
        assert max_difference(end, alone) < TOLERANCE
        # a row meets all others, not half of them: 4 n d a row instead of 3
        assert end.work == pytest.approx(alone.work * 4 / 3 / shape[-1], rel=0.15)
