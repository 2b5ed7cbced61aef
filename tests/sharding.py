"""Networks, and how they are cut over ranks."""

from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import prune

from tests.models import Automatic, Manual, loader
from tests.ranks import Shared, data

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
except ImportError:  # before torch 2.6 FSDP2 is not public, and asks for a GPU
    from torch.distributed._tensor import Replicate, Shard, distribute_tensor

    fully_shard = None

needs_fsdp2 = pytest.mark.skipif(
    fully_shard is None, reason="FSDP2 before torch 2.6 asks for a GPU"
)


class Parallel(Automatic):
    """Cut in the hook in which Lightning asks for it."""

    def __init__(self, cut, **kwargs):
        super().__init__(**kwargs)
        self.cut = cut

    def configure_model(self):
        self.cut(self.net, self.device_mesh)


class ParallelManual(Parallel, Manual):
    """The same in manual optimisation."""


def replicated(x, mesh):
    """A DTensor of which every rank has all."""
    return distribute_tensor(x, mesh, [Replicate()])


def by_rows(x, mesh):
    """A DTensor of which every rank has some rows."""
    return distribute_tensor(x, mesh, [Shard(0)])


def layer_by_layer(net, mesh, **policy):
    """FSDP2, each layer by itself."""
    for part in net.children():
        if list(part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"], **policy)
    as_a_whole(net, mesh, **policy)


def as_a_whole(net, mesh, **policy):
    """FSDP2, what is left together: it stays whole from the forward pass to the backward pass."""
    fully_shard(net, mesh=mesh["data_parallel"], **policy)


def in_bfloat16(net, mesh):
    """FSDP2 that computes in bfloat16, and keeps and reduces in float32."""
    layer_by_layer(
        net,
        mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    )


def in_bfloat16_but_for_the_head(net, mesh):
    """The same, the head with the root: that stays whole, in bfloat16, from the forward pass to the backward pass."""
    policy = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    }
    for part in list(net.children())[:-1]:
        if list(part.parameters()):
            fully_shard(part, mesh=mesh["data_parallel"], **policy)
    as_a_whole(net, mesh, **policy)


def columns_and_rows(net, mesh):
    """Tensor parallel: one Linear by its rows, which are the neurons, the next by its columns."""
    parallelize_module(
        net, mesh["tensor_parallel"], {"5": ColwiseParallel(), "7": RowwiseParallel()}
    )


def rows_alone(net, mesh):
    """Tensor parallel: each Linear by its rows, which may be uneven where what it gives is gathered."""
    plan = {
        name: ColwiseParallel(output_layouts=Replicate())
        for name, part in net.named_children()
        if list(part.parameters())
    }
    parallelize_module(net, mesh["tensor_parallel"], plan)


def vocabulary(net, mesh):
    """Tensor parallel: an embedding and a head by their rows."""
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(net, mesh["tensor_parallel"], plan)


def both_ways(net, mesh):
    """Two-dimensional: tensor parallel, and FSDP2 over that."""
    columns_and_rows(net, mesh)
    layer_by_layer(net, mesh)


def body_apart(net, mesh):
    """FSDP2, the body by itself, and a tied weight with the rest."""
    fully_shard(net.body, mesh=mesh["data_parallel"])
    as_a_whole(net, mesh)


class Validated(Parallel):
    """Validates in between: that leaves what is wrapped as a whole unsharded."""

    def train_dataloader(self):
        return Shared.train_dataloader(self)

    def val_dataloader(self):
        return loader(data()[:1])

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


class FSDPOnTheCPU(FSDPStrategy):
    """FSDP1 on the CPU: Lightning refuses that to its own class only, but hands on the index of a device."""

    def __init__(self, **kwargs):
        super().__init__(process_group_backend="gloo", **kwargs)

    def _setup_model(self, model):
        return flat(model, sharding_strategy=self.sharding_strategy, **self.kwargs)


flat = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))


class WithFlatOptimizer(Automatic):
    """What FSDP1 asks for without the original parameters."""

    def configure_optimizers(self):
        return self.make_optimizer(self.trainer.model.parameters())


def uneven_network():
    """Seven neurons, which two ranks cannot halve, and four, of which the third of three ranks has none."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def network_with_equal_neurons():
    """Four of them part along a seeded direction, one of them mirrored."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 9), nn.Tanh(), nn.Linear(9, 3))
    with torch.no_grad():
        net[1].weight[[1, 5, 8]] = net[1].weight[0] * torch.tensor([[1.0], [2.0], [-1.0]])
    return net


class Tokens(nn.Module):
    """An embedding with a padding in its middle, packed attention, an LSTM and a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embedding(as_tokens(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """A head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(as_tokens(x)).mean(1)).tanh())[:, :3]


class Untied(Tied):
    """The same with a head of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 9)


def as_tokens(x):
    """A dozen pixels as whole numbers from 0 to 8."""
    return (x.flatten(1)[:, :12] * 3).round().long().clamp(-4, 4) + 4


class Rebuilt:
    """In the second epoch two layers are new ones, cut as the first ones were, with an optimizer for all."""

    def on_train_epoch_start(self):
        if self.current_epoch != 1:
            return
        torch.manual_seed(1)
        for i in (5, 7):
            new = nn.Linear(self.net[i].in_features, self.net[i].out_features)
            self.recut(new)
            self.net[i] = new
        self.trainer.strategy.optimizers = [self.make_optimizer(self.parameters())]

    def recut(self, layer):
        """Nothing is cut on one process."""


class RebuiltParallel(Rebuilt, Parallel):
    def recut(self, layer):
        self.cut(layer, self.device_mesh)


def rows_of_a_layer(net, mesh):
    """Tensor parallel: a Linear by its rows; of a network its last two."""
    plan = ColwiseParallel(output_layouts=Replicate())
    for layer in [net] if isinstance(net, nn.Linear) else [net[5], net[7]]:
        parallelize_module(layer, mesh["tensor_parallel"], plan)


class RebuiltAlone(Rebuilt, Automatic):
    pass


class Changing(Automatic):
    """In the second epoch a layer is pruned, one is frozen, and another optimizer takes over."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            prune.l1_unstructured(self.net[5], "weight", 0.3)
            self.net[2].requires_grad_(False)
            self.trainer.strategy.optimizers = [
                torch.optim.Adam(self.parameters(), lr=0.01, eps=1e-3)
            ]
