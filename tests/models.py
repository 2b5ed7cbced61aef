"""Small LightningModules and the Trainer that runs them quietly on the CPU."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hsu import HypersphericalUniformity


def network():
    """A convolution, a grouped convolution, a Linear and a head: every place a gradient can go to."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.Tanh(),
        nn.Linear(12, 3),
    )


def batches(count=7, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count * size, 1, 6, 6, generator=generator).to(dtype)
    y = torch.randn(count * size, 3, generator=generator).to(dtype)
    return list(zip(x.split(size), y.split(size), strict=True))


def loader(data):
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=len(data[0][0]))


def mean_square(output, target):
    return (output - target).square().mean()


class Automatic(pl.LightningModule):
    """Mean squared error in automatic optimisation; returns None on the batches of ``silent``."""

    def __init__(self, make_optimizer=None, silent=(), net=None):
        super().__init__()
        self.net = network() if net is None else net
        self.make_optimizer = make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        self.silent = silent

    def training_step(self, batch, batch_idx):
        if batch_idx in self.silent:
            return None
        return mean_square(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Manual(Automatic):
    """The same loss in ``parts`` calls of manual_backward."""

    def __init__(self, parts=1, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.parts = parts

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for _ in range(self.parts):
            self.manual_backward(mean_square(self.net(batch[0]), batch[1]) / self.parts)
        optimizer.step()


class Adversarial(pl.LightningModule):
    """Two networks with an optimizer each; the second's loss leaves gradients in the first."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), nn.Linear(3, 4)

    def losses(self, batch):
        made = self.first(batch[0])
        return mean_square(made, batch[1]), self.second(made).square().mean()

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            loss = self.losses(batch)[i]
            for other in self.optimizers():
                other.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.Adam(self.second.parameters(), lr=0.01)]


def trainer(*callbacks, **kwargs):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **kwargs})


def uniformity(**kwargs):
    return HypersphericalUniformity(**{"verbose": False, **kwargs})
