"""What runs on each rank: a fit or a plain loop on its share of the data, and what that ends with.

Ranks are sent what makes a model, not the model: all begin with one seed.
"""

import math
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from lightning_hsu import reference
from lightning_hsu._engine import sharing
from tests.models import batches, loader, trainer, uniformity


def data():
    """Three batches that two, three or four ranks can share."""
    return batches(count=3, size=12)


class Shared(pl.LightningDataModule):
    """Each rank's share of every batch; ranks that are tensor parallel get the same."""

    def train_dataloader(self):
        place = self.trainer.strategy.distributed_sampler_kwargs
        return loader(
            [
                tuple(part[place["rank"] :: place["num_replicas"]] for part in batch)
                for batch in data()
            ]
        )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def make_module(kind, make_net, **settings):
    return kind(net=make_net(), **settings)


class Keep(Logger):
    """Keeps what is logged, on every rank."""

    name, version = "keep", 0

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params, *args, **kwargs):
        """There are none."""


@dataclass(frozen=True)
class End:
    """What a rank ends with.

    Args:
        parameters: Whole, by name.
        rows: What it logged, by step.
        messages: How often one rank had gradients for all.
        work: FLOP of the library's matrix products; 0 where they were not counted.
    """

    parameters: dict[str, torch.Tensor]
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    messages: int = 0
    work: int = 0


def fit(make, callback, strategy, settings, **given):
    """Train ``make()`` with ``strategy()``, each rank on its share of the data."""
    shared = {
        "strategy": strategy(),
        "devices": distributed.get_world_size(),
        "use_distributed_sampler": False,
    }
    return _fit(make, callback, shared | settings, **{"datamodule": Shared(), **given})


def fit_sharing(*args, **given):
    """The same, where ranks compute layers of any size for one another."""
    with shares_every_layer():
        return fit(*args, **given)


@contextmanager
def shares_every_layer():
    """Layers of the tests are small."""
    with mock.patch.object(sharing, "worth_sharing", return_value=0.0):
        yield


def fit_alone(make, callback, settings, **given):
    """Train ``make()`` on one process with the whole batches."""
    torch.manual_seed(0)
    return _fit(make, callback, settings, train_dataloaders=loader(data()), **given)


_ALONE = {}


def fit_alone_once(make, callback, settings, beside=None):
    """The same for a ``partial(make_module, ...)``, kept for all tests of this run that train alike.

    ``beside`` tells trainings apart in which something else differs.
    """
    words = [sorted(map(repr, given.items())) for given in (make.keywords, callback, settings)]
    key = (make.func, make.args, repr(words), beside)
    if key not in _ALONE:
        _ALONE[key] = fit_alone(make, callback, settings)
    return _ALONE[key]


def _fit(make, callback, settings, **given):
    module = make()
    keep = Keep()
    messages = []
    fit = trainer(uniformity(**callback), **{"logger": keep, "log_every_n_steps": 3, **settings})
    with (
        counted_messages(messages),
        mock.patch.object(reference, "_simulated", few_random_layers),
    ):
        fit.fit(module, **given)
    return End(whole(module, fit.strategy.model), keep.rows, len(messages))


@cache
def few_random_layers(measure, n, d):
    """For the reference of a measure without an expectation, where a thousand take seconds."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([measure(torch.randn(n, d, generator=generator)).double() for _ in range(3)])


class Save(pl.Callback):
    """Saves what each rank ends with."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(whole_tensors(pl_module), f"{self.folder}/{trainer.global_rank}.pt")


def fit_in_two(make, callback, strategy, settings, path):
    """Train for one epoch, save a checkpoint and go on with another model, another callback and another Trainer."""
    fit_first_epoch(make, callback, strategy, settings, path)
    return fit_from(make, callback, strategy, settings, path)


def fit_first_epoch(make, callback, strategy, settings, path):
    """Train for one epoch and save a checkpoint."""
    shared = {
        "strategy": strategy(),
        "devices": distributed.get_world_size(),
        "use_distributed_sampler": False,
    }
    first = trainer(uniformity(**callback), **{**shared, **settings, "max_epochs": 1})
    with mock.patch.object(reference, "_simulated", few_random_layers):
        first.fit(make(), datamodule=Shared())
    first.save_checkpoint(path)


def fit_from(make, callback, strategy, settings, path):
    """Go on from a checkpoint."""
    return fit(make, callback, strategy, settings, ckpt_path=path)


def same_bits(ends):
    """Whether all ranks end with the same, and logged the same."""
    first = ends[0]
    return all(
        repr(end.rows) == repr(first.rows)
        and all(torch.equal(p, first.parameters[name]) for name, p in end.parameters.items())
        for end in ends
    )


def max_difference(end, other):
    """Over all parameters."""
    assert end.parameters.keys() == other.parameters.keys()
    return max(
        float((p - other.parameters[name]).abs().max()) for name, p in end.parameters.items()
    )


def error_of(function, *args):
    """The error of a call, in words; None without."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def whole(module, model):
    """Whole parameters of a module, which FSDP1 may have wrapped as ``model``."""
    if not any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        return whole_tensors(module)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return whole_tensors(module)


def whole_tensors(module):
    named = {
        name.replace("_fsdp_wrapped_module.", ""): p.detach()
        for name, p in module.named_parameters()
    }
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
        for name, p in named.items()
    }


@contextmanager
def counted_messages(calls):
    """Note every broadcast that the library asks for."""
    broadcast = distributed.broadcast

    def noted(*args, **kwargs):
        if sys._getframe(1).f_globals["__name__"].startswith("lightning_hsu"):
            calls.append(args)
        return broadcast(*args, **kwargs)

    with mock.patch.object(distributed, "broadcast", noted):
        yield


def train(net, model, x, regularizer, mode):
    """Three steps of a model, whose layers are those of ``net``."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    messages, work = [], []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if mode == "gradient":
            with counted_messages(messages), counted_work(work):
                regularizer.add_gradients(optimizer)
        optimizer.step()
        if mode == "decoupled":
            with counted_messages(messages), counted_work(work):
                regularizer.move(optimizer)
    return End(whole_tensors(net), messages=len(messages), work=sum(work))


@contextmanager
def counted_work(flop):
    """Note the FLOP of the matrix products within."""
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(IN_PLACE, product)) as count:
        yield
    flop.append(count.get_total_flops())


IN_PLACE = (
    torch.ops.aten.addmm_,
    torch.ops.aten.baddbmm_,
)  # FlopCounterMode knows only those that are not


def product(total, a, b, **_):
    """FLOP of a product of matrices of such shapes."""
    return 2 * math.prod(a) * b[-1]
