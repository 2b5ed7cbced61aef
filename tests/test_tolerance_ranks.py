"""Kept gradients on ranks that train together: all compute the same layers, and train as one process."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_hsu import Share, UniformityRegularizer
from lightning_hsu.measures import Covering, GaussianPotential
from tests import models, plain, ranks, sharding
from tests.models import Automatic, mean_square, trainer, uniformity
from tests.processes import world
from tests.ranks import batches, make_module
from tests.sharding import needs_fsdp2
from tests.test_tolerance import ALL, HALF_SPACE, Kept, tower, tower_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:DTensor random operators may not have complete support",  # torch 2.4's
    ),
]

STEPS = 18


def data():
    return batches(count=6, size=12, dtype=torch.float64)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def in_parallel(net, way):
    """The network as it is called, cut over the ranks; whether each rank has its own part of the data."""
    size = torch.distributed.get_world_size()
    if way == "DDP":
        return DistributedDataParallel(net), True
    if way == "FSDP1":
        return sharding.flat(net, use_orig_params=True), True
    if way == "FSDP2":
        sharding.layer_by_layer(
            net, init_device_mesh("cpu", (size,), mesh_dim_names=("data_parallel",))
        )
        return net, True
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tensor_parallel",))
    sharding.columns_and_rows(net, mesh)
    return net, False


def train(way, mode, make, settings):
    """What each step computed and projected, the weights at the end, and how gradients age.

    One rank asks for the state in between.
    """
    torch.manual_seed(0)
    net = make().double()
    model, is_apart = in_parallel(net, way)
    optimizer = sgd(net.parameters())
    regularizer = UniformityRegularizer(
        **{"measure": HALF_SPACE, "coefficient": 0.05, "tolerance": 0.3, **settings}
    ).attach(model)
    rank, uses = torch.distributed.get_rank(), []
    deltas = regularizer.state.deltas
    for step in range(STEPS):
        x, y = data()[step % 6]
        if is_apart:
            x, y = x[rank::2], y[rank::2]
        optimizer.zero_grad()
        loss = mean_square(model(x), y)
        if mode == "loss":
            regularizer.add_to_loss(loss, optimizer)
        loss.backward()
        if mode == "loss":
            regularizer.count_step(optimizer)
        if mode == "gradient":
            regularizer.add_gradients(optimizer)
        optimizer.step()
        if mode == "decoupled":
            regularizer.move(optimizer)
        uses.append((set(deltas.computed), set(deltas.projected)))
        if rank == 0 and step % 7 == 3:
            regularizer.state_dict()
    return uses, ranks.whole(net, model), regularizer.state_dict()["reuse"]


def train_alone(schedule, mode, make, layers, measure=HALF_SPACE, strength=0.05, follows=True):
    """A plain loop that computes the same layers.

    Where a rank has some rows only, as with FSDP2, the pull along the sum of all is not followed.
    """
    torch.manual_seed(0)
    net = make().double()
    optimizer = sgd(net.parameters())
    kept = Kept(layers(net, measure), mode, lambda *_: strength)
    kept.follows = follows
    for step, uses in enumerate(schedule):
        x, y = data()[step % 6]
        optimizer.zero_grad()
        mean_square(net(x), y).backward()
        if mode != "decoupled":
            kept.before_step(step, optimizer, uses)
        optimizer.step()
        if mode == "decoupled":
            kept.after_step(step, optimizer, uses)
    return dict(net.named_parameters())


def pictures(net, measure):
    return plain.layers(net, "", measure)


def check(way, mode, make=models.network, layers=pictures, **settings):
    ends = world(2).run(train, way, mode, make, settings)
    schedule, weights, reuse = ends[0]
    assert ends[1][0] == schedule
    assert ends[1][2] == reuse
    for name, p in ends[1][1].items():
        assert torch.equal(p, weights[name])
    measure = settings.get("measure", HALF_SPACE)
    strength = settings.get("coefficient", 0.05)
    alone = train_alone(schedule, mode, make, layers, measure, strength, way != "FSDP2")
    assert weights.keys() == alone.keys()
    for name, p in alone.items():
        assert float((p.detach() - weights[name]).abs().max()) < 1e-10
    return [computed for computed, _ in schedule]


def ways():
    for way in ("DDP", "FSDP1", "FSDP2", "tensor parallel"):
        for mode in ALL:
            if way != "FSDP1" or mode != "loss":  # which is refused, see tests/test_sharded.py
                yield pytest.param(way, mode, marks=needs_fsdp2 if way == "FSDP2" else ())


@pytest.mark.parametrize(("way", "mode"), list(ways()))
def test_ranks_compute_the_same_layers_and_train_as_one_process(way, mode):
    schedule = check(way, mode)
    assert sum(map(len, schedule)) < 3.4 * STEPS


@pytest.mark.parametrize(
    ("way", "mode", "settings"),
    [
        pytest.param("FSDP2", "decoupled", {"coefficient": Share(0.2)}, marks=needs_fsdp2),
        ("tensor parallel", "gradient", {"coefficient": Share(0.2)}),
        ("DDP", "gradient", {"measure": GaussianPotential()}),
        pytest.param("FSDP2", "gradient", {"measure": Covering()}, marks=needs_fsdp2),
    ],
    ids=str,
)
def test_ranks_agree_on_shares_and_measures(way, mode, settings):
    if "measure" in settings:
        check(way, mode, tower, tower_layers, **settings)
    else:
        check(way, mode, **settings)


def kept_bytes(way, mode):
    """The memory of the kept gradients of a rank after some steps, and that of the weights they are of."""
    net = models.network().double()
    model, _ = in_parallel(net, way)
    optimizer = sgd(net.parameters())
    regularizer = UniformityRegularizer(coefficient=0.05, tolerance=0.3).attach(model)
    x, y = data()[0]
    for _ in range(3):
        optimizer.zero_grad()
        mean_square(model(x), y).backward()
        if mode == "gradient":
            regularizer.add_gradients(optimizer)
        optimizer.step()
        if mode == "decoupled":
            regularizer.move(optimizer)
    deltas = regularizer.state.deltas._deltas
    kept = sum(delta.grad.nbytes for delta in deltas.values())
    return kept, sum(8 * math.prod(layer.target.shape) for layer in regularizer.layers)


@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
@pytest.mark.parametrize(
    ("way", "part"), [("DDP", 1.0), pytest.param("FSDP2", 0.5, marks=needs_fsdp2)]
)
def test_a_rank_keeps_gradients_of_the_neurons_that_it_holds_alone(way, part, mode):
    answers = world(2).run(kept_bytes, way, mode)
    whole = answers[0][1]
    for kept, _ in answers:
        assert abs(kept - part * whole) <= 0.1 * whole  # odd numbers of rows
    if part < 1.0:
        assert sum(kept for kept, _ in answers) == whole


class SavesAfterAnEpoch(pl.Callback):
    """Saves a checkpoint after the first epoch, on rank 0, in a training that goes on."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def fit_and_save(path, ckpt_path=None):
    """The weights of a rank after two epochs, or of one that goes on from a checkpoint."""
    module = make_module(Automatic, models.network, make_optimizer=ranks.sgd)
    fit = trainer(
        uniformity(coefficient=0.5, tolerance=0.3),
        SavesAfterAnEpoch(path),
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        use_distributed_sampler=False,
    )
    fit.fit(module, datamodule=ranks.Shared(), ckpt_path=ckpt_path)
    return ranks.whole_tensors(module)


def test_ranks_go_on_from_a_checkpoint_as_those_that_saved_it(tmp_path):
    """A resumed training computes every gradient first. So must each rank of one that saves and goes on."""
    ends = world(2).run(fit_and_save, tmp_path / "a.ckpt")
    resumed = world(2).run(fit_and_save, tmp_path / "b.ckpt", tmp_path / "a.ckpt")
    for end in (*ends, *resumed):
        for name, p in end.items():
            # Measured: 0, and 2e-3 where ranks go on with gradients from before.
            torch.testing.assert_close(p, ends[0][name], rtol=0.0, atol=1e-6)
