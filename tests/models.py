"""Small LightningModules and the Trainer that runs them quietly on the CPU."""

import copy
import pickle

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
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


def weight_normed_network():
    """The same with two layers whose weights are computed from parameters."""
    net = network()
    weight_norm(net[0])
    weight_norm(net[5])
    return net


class Detour(nn.Sequential):
    """Layers like those of ``network``, of which the sixth takes no part."""

    def forward(self, x):
        for i, layer in enumerate(self):
            x = x[:, :12] if i == 5 else layer(x)
        return x


def images():
    """A grouped and a transposed convolution."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def image_network():
    """Neurons that do not lie in one piece: a transposed convolution, all in the memory format channels_last."""
    return images().to(memory_format=torch.channels_last)


class SequenceNetwork(nn.Module):
    """Several sets of neurons in one weight: an LSTM and attention over the rows of the image."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.lstm(x.squeeze(1))[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, -1])


def network_of_trained_biases():
    net = network()
    net[2].weight.requires_grad_(False)
    net[5].weight.requires_grad_(False)
    return net


def partly_frozen_network():
    net = network()
    net[0].requires_grad_(False)
    net[5].requires_grad_(False)
    return net


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


class WithBackbone(Automatic):
    """What BackboneFinetuning asks for."""

    @property
    def backbone(self):
        return self.net[:3]


class Scheduled(Automatic):
    """The learning rate halves after every second step."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
                "interval": "step",
            }
        ]


class Manual(Automatic):
    """The same loss in ``parts`` calls of manual_backward, a step on every ``every``-th batch, clipped to the norm ``clip``.

    With ``zero_after`` gradients are set to zero after the step, with ``raw`` the optimizer steps behind Lightning's back.
    """

    def __init__(self, parts=1, every=1, clip=None, zero_after=False, raw=False, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.parts = parts
        self.every = every
        self.clip = clip
        self.zero_after = zero_after
        self.raw = raw

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        if batch_idx % self.every == 0 and not self.zero_after:
            optimizer.zero_grad()
        for _ in range(self.parts):
            self.manual_backward(
                mean_square(self.net(batch[0]), batch[1]) / self.every / self.parts
            )
        if (batch_idx + 1) % self.every == 0:
            if self.clip:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
            if self.zero_after:
                optimizer.zero_grad()


class UnscalesAndClips(Manual):
    """Lightning's clipping refuses fused optimizers, so gradients are unscaled and clipped by hand."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(mean_square(self.net(batch[0]), batch[1]))
        self.trainer.precision_plugin.scaler.unscale_(optimizer.optimizer)
        nn.utils.clip_grad_norm_(self.parameters(), 0.3)
        optimizer.step()


class Adversarial(pl.LightningModule):
    """Two networks with an optimizer each; the second's loss leaves gradients in the first, unless toggled."""

    def __init__(self, toggle=False):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = network(), nn.Linear(3, 4)
        self.toggle = toggle

    def losses(self, batch):
        made = self.first(batch[0])
        return mean_square(made, batch[1]), self.second(made).square().mean()

    def training_step(self, batch, batch_idx):
        for i, optimizer in enumerate(self.optimizers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = self.losses(batch)[i]
            for other in self.optimizers():
                other.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.first.parameters(), lr=0.1),
            torch.optim.Adam(self.second.parameters(), lr=0.01),
        ]


class SharpnessAware(torch.optim.Optimizer):
    """Steps with the gradient of a place uphill: the closure runs twice, the weights move in between."""

    def __init__(self, parameters, lr=0.1, way=0.05):
        super().__init__(parameters, {"lr": lr, "way": way})

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p, _ in pairs]
        for p, group in pairs:
            p.add_(p.grad, alpha=group["way"])
        torch.enable_grad()(closure)()
        for (p, group), old in zip(pairs, before, strict=True):
            p.copy_(old).add_(p.grad, alpha=-group["lr"])
        return loss


class WithoutRecording(torch.optim.Optimizer):
    """Gradient descent that calls its closure with gradients switched off, as some do."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        return loss


class StepsThroughItsParent(torch.optim.SGD):
    """A subclass that adds nothing: torch then runs its step hooks twice a step."""

    def step(self, closure=None):
        return super().step(closure)


class UnfreezeLater(callbacks.BaseFinetuning):
    """The first layer joins in the second epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


class PruneTwo(callbacks.ModelPruning):
    """Prune net.0 and net.5 after each epoch."""

    def __init__(self):
        super().__init__(
            "l1_unstructured",
            amount=0.3,
            use_global_unstructured=False,
            use_lottery_ticket_hypothesis=False,  # it would set the weights back to their first values
            make_pruning_permanent=False,
        )

    def filter_parameters_to_prune(self, parameters_to_prune=()):
        return [
            (module, name)
            for module, name in parameters_to_prune
            if name == "weight" and len(module.weight) in (6, 12)
        ]


class KeepRun(pl.Callback):
    """Keep the parameters of the run before an average takes their place."""

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.run = copy.deepcopy(pl_module.net)


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


def used_before(callback):
    """The callback after the fit of another model."""
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))
    trainer(callback, max_epochs=1).fit(Automatic(net=other), loader(batches(3)))
    return callback


def used_before_and_unpickled(callback):
    return pickle.loads(pickle.dumps(used_before(callback)))


def fit_twice(fit, module, data):
    """The second time from where the first ended, with a new optimizer."""
    for epochs in (1, 2):
        fit.fit_loop.max_epochs = epochs
        fit.fit(module, loader(data))


def fit_and_resume(fit, module, data):
    """The first epoch with another Trainer, another module and another callback."""
    first = trainer(*copy.deepcopy(fit.callbacks[:1]), max_epochs=1)
    first.fit(copy.deepcopy(module), loader(data))
    first.save_checkpoint("first.ckpt")
    fit.fit(module, loader(data), ckpt_path="first.ckpt")


def compile_net(module):
    module.net = torch.compile(module.net, backend="eager")
    return module


def compile_all(module):
    return torch.compile(module, backend="eager")
