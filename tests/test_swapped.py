"""torch.utils.swap_tensors refuses tensors with weak references: nothing of ours has one to a weight."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from tests.test_own_loops import X, network

COEFFICIENTS = [None, 0.0, 0.3]


@pytest.fixture
def swaps():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def swap(net):
    torch.utils.swap_tensors(net[0].weight, nn.Parameter(0.5 * net[0].weight.detach()))


def load(net):
    net.load_state_dict({name: 0.5 * value for name, value in net.state_dict().items()})


def double(net):
    net.double()


def loss_of(net, x):
    return net(x.to(net[0].weight.dtype)).square().mean()


def own_loop(coefficient, act, order):
    """Weights after four steps, with a change of the model after the second."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = None
    if coefficient is not None:
        regularizer = UniformityRegularizer(coefficient=coefficient).attach(net)
    for step in range(4):
        if step == 2:
            act(net)
        optimizer.zero_grad()
        loss_of(net, X).backward()
        for call in order:
            if call == "step":
                optimizer.step()
            elif regularizer is not None:
                getattr(regularizer, call)(optimizer)
    if regularizer is not None:
        assert [layer.name for layer in regularizer.measure_layers()] == ["0", "2", "4", "5"]
    return [p.detach() for p in net.parameters()]


def check(ends, act):
    """Without us, monitored and penalised: the first two are alike, the third is not."""
    plain, monitored, penalised = ends
    for p, q in zip(plain, monitored, strict=True):
        assert torch.equal(p, q)
    assert not torch.allclose(plain[0], penalised[0])
    assert (act is double) == (penalised[0].dtype == torch.float64)


@pytest.mark.usefixtures("swaps")
@pytest.mark.parametrize("order", [("add_gradients", "step"), ("step", "move")])
@pytest.mark.parametrize("act", [swap, load, double])
def test_in_an_own_loop(act, order):
    check([own_loop(one, act, order) for one in COEFFICIENTS], act)


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, index):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class At(pl.Callback):
    def __init__(self, act):
        self.act = act

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 2:
            self.act(module.net)


def fit(coefficient, act, apply):
    module = Net()
    callbacks = [At(act)]
    if coefficient is not None:
        callback = HypersphericalUniformity(coefficient=coefficient, apply=apply, verbose=False)
        callbacks.insert(0, callback)
    pl.Trainer(
        callbacks=callbacks,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(X, batch_size=4))
    return [p.detach() for p in module.parameters()]


@pytest.mark.usefixtures("swaps")
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*isinstance.treespec")
@pytest.mark.parametrize("apply", ["gradient", "decoupled"])
@pytest.mark.parametrize("act", [swap, load, double])
def test_in_a_fit(act, apply):
    check([fit(one, act, apply) for one in COEFFICIENTS], act)
