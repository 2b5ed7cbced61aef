"""What is found during a fit: heads by the loss, frozen layers measured once, monitors that never stop a training."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel

from lightning_hsu import HypersphericalUniformity, UniformityRegularizer, register_neurons
from lightning_hsu._monitor import measure as monitor
from lightning_hsu._neurons.rules import _RULES
from lightning_hsu.measures import RieszEnergy
from tests import ranks
from tests.models import trainer, uniformity
from tests.processes import world

PENALTY = "ignore:the penalty has not reached layer"


class HeadFirst(BoringModel):
    """The head is registered before its encoder."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.encoder = nn.Linear(32, 8)

    def forward(self, x):
        return self.layer(self.encoder(x).relu())


class TwoHeads(HeadFirst):
    """Boxes and classes, the classes by a 1 x 1 convolution, each with a term of the loss."""

    def __init__(self):
        super().__init__()
        self.boxes = nn.Linear(8, 4)
        self.classes = nn.Conv1d(8, 5, 1)
        self.layer = nn.Linear(8, 8)
        self.encoder = nn.Linear(32, 8)

    def training_step(self, batch, batch_idx):
        x = self.layer(self.encoder(batch).relu())
        classes = self.classes(x.unsqueeze(-1)).square().mean()
        return 0.5 * self.boxes(x).abs().mean() + classes


class Distilled(HeadFirst):
    """A frozen teacher, and an average that is updated in place, both registered last."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(32, 2).requires_grad_(False)
        self.average = AveragedModel(self.encoder)
        self.moving = copy.deepcopy(self.encoder).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        loss = (self(batch) - self.teacher(batch)).square().mean()
        self.average.update_parameters(self.encoder)
        for mine, its in zip(self.moving.parameters(), self.encoder.parameters(), strict=True):
            mine.data.mul_(0.5).add_(its.data, alpha=0.5)
        return loss


class ByHand(HeadFirst):
    """Manual optimisation, whose first backward is not Lightning's."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self(batch).square().mean()
        self.manual_backward(loss)
        optimizer.step()


class Keep(pl.Callback):
    """Keeps the summary of the running fit."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.summary = trainer.callbacks[0].summary


def fitted(module, callback=None, **settings):
    callback = callback or uniformity()
    keep = Keep()
    settings = {"max_steps": 4, "log_every_n_steps": 1, "limit_val_batches": 0, **settings}
    fit = trainer(callback, keep, **settings)
    fit.fit(module)
    return fit, keep.summary


def heads(summary):
    return {layer.name: layer.head_reason for layer in summary.layers if layer.is_head}


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (HeadFirst, {"layer"}),
        (TwoHeads, {"boxes", "classes"}),
        (Distilled, {"layer"}),
        (ByHand, {"layer"}),
    ],
)
@pytest.mark.filterwarnings(PENALTY)
def test_heads_are_last_before_the_loss(kind, expected, apply):
    if kind is ByHand and apply == "loss":
        apply = "gradient"  # which manual optimisation refuses
    callback = uniformity(apply=apply, coefficient=0.3)
    assert callback.summary is None
    _, summary = fitted(kind(), callback)
    assert heads(summary) == dict.fromkeys(expected, "last before the loss")
    assert callback.summary is None
    for layer in summary.layers:
        assert layer.measure.half_space != layer.is_head


def test_the_first_step_has_the_right_head():
    """The penalty of a head is in full space from the first step on."""
    torch.manual_seed(0)
    with_penalty, without = HeadFirst(), None
    without = copy.deepcopy(with_penalty)
    before = with_penalty.layer.weight.detach().clone()
    for module, coefficient in ((with_penalty, 0.5), (without, 0.0)):
        torch.manual_seed(1)
        fitted(module, uniformity(coefficient=coefficient), max_steps=1)
    weight = before.double().requires_grad_()
    (grad,) = torch.autograd.grad(RieszEnergy(s=2.0)(weight[None]).sum(), weight)
    change = with_penalty.layer.weight.detach() - without.layer.weight.detach()
    lr = with_penalty.trainer.optimizers[0].param_groups[0]["lr"]
    torch.testing.assert_close(change, (-lr * 0.5 * grad).float(), rtol=1e-4, atol=1e-6)


def test_named_heads_overrule():
    _, summary = fitted(TwoHeads(), uniformity(head=["boxes", "encoder"]))
    assert heads(summary) == {"boxes": "named", "encoder": "named"}
    _, summary = fitted(TwoHeads(), uniformity(head=None))
    assert heads(summary) == {}


@pytest.mark.filterwarnings(PENALTY)
def test_a_resumed_fit_has_the_heads_of_the_first(tmp_path):
    class Alternating(TwoHeads):
        """From the second batch on only one head takes part."""

        def training_step(self, batch, batch_idx):
            if self.global_step == 0:
                return super().training_step(batch, batch_idx)
            return self.boxes(self.layer(self.encoder(batch).relu())).abs().mean()

    settings = {"max_steps": -1, "limit_train_batches": 2, "limit_val_batches": 0}
    fit, _ = fitted(Alternating(), uniformity(coefficient=0.1), max_epochs=1, **settings)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    callback, keep = uniformity(coefficient=0.1), Keep()
    again = trainer(callback, keep, max_epochs=2, **settings)
    again.fit(Alternating(), ckpt_path=tmp_path / "a.ckpt")
    assert set(heads(keep.summary)) == {"boxes", "classes"}


def test_in_a_loop_of_ones_own_the_first_outputs_tell():
    model = HeadFirst()
    regularizer = UniformityRegularizer().attach(model)
    assert heads(regularizer.summary) == {"encoder": "guessed: last Linear"}
    model.eval()(torch.randn(3, 32))
    with torch.no_grad():
        model.train()(torch.randn(3, 32))
    assert "encoder" in heads(regularizer.summary)
    model(torch.randn(3, 32))
    assert heads(regularizer.summary) == {"layer": "last before the loss"}
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # with a hook that does nothing
    copied(torch.randn(3, 32))
    regularizer.detach()
    assert not model._forward_hooks
    assert regularizer.summary is None


def test_a_loss_tells_where_the_model_returns_something_else():
    model = HeadFirst()
    regularizer = UniformityRegularizer().attach(model, watch=False)
    assert not model._forward_hooks
    hidden = model.encoder(torch.randn(3, 32))
    regularizer.find_head((hidden.mean(), model.layer(hidden.relu()).mean()))
    assert set(heads(regularizer.summary)) == {"layer"}
    regularizer.find_head(torch.zeros(()))  # without a graph nothing is known
    assert set(heads(regularizer.summary)) == {"layer"}
    with pytest.raises(RuntimeError, match="call attach"):
        UniformityRegularizer().find_head(torch.zeros(()))


class Branches(pl.LightningModule):
    """In the first batch each rank takes another head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(36, 8)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def training_step(self, batch, batch_idx):
        x = self.encoder(batch[0].flatten(1)).relu()
        losses = [head(x).square().mean() for head in self.heads]
        if batch_idx == 0:
            return losses[distributed.get_rank()]
        return losses[0] + losses[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_branches(settings):
    from lightning.pytorch.strategies import DDPStrategy

    def strategy():
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)

    torch.manual_seed(0)
    return ranks.fit(Branches, {"coefficient": 0.5}, strategy, settings)


@pytest.mark.slow
@pytest.mark.filterwarnings(PENALTY)
def test_ranks_that_see_different_graphs_agree_on_the_head():
    ends = world(2).run(fit_branches, {"limit_val_batches": 0})
    assert ranks.same_bits(ends)


# Frozen layers


def test_frozen_layers_are_measured_once_and_stay_out_of_the_aggregates(tmp_path, monkeypatch):
    counted = {}
    measure_neurons = monitor.measure_neurons

    def counting(name, *args, **kwargs):
        counted[name] = counted.get(name, 0) + 1
        return measure_neurons(name, *args, **kwargs)

    monkeypatch.setattr(monitor, "measure_neurons", counting)
    module = Distilled()
    nn.init.constant_(module.teacher.weight, 1e-3)  # coincident: an enormous ratio
    logger = CSVLogger(tmp_path)
    callback = uniformity(verbose=True, coefficient=0.2)
    fit, summary = fitted(module, callback, logger=logger, max_steps=6)
    assert counted["teacher"] == 1
    assert counted["encoder"] > 4
    assert counted["moving"] == 2  # once more at the end, since it has moved
    assert fit.callback_metrics["hsu/ratio_max"] < 2
    trainable = {layer.name: layer.trainable for layer in summary.layers}
    assert [name for name, trains in trainable.items() if trains] == ["layer", "encoder"]
    assert [layer.giga_flops for layer in summary.layers if not layer.trainable] == [0.0] * 3
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    teacher = columns.index("hsu/ratio/teacher")
    assert sum(1 for row in rows[1:] if row.split(",")[teacher]) == 1


def test_a_layer_counts_from_when_it_trains():
    class Backbone(HeadFirst):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(32, 8))
            nn.init.ones_(self.backbone[0].weight)  # the largest ratio
            del self.encoder

        def forward(self, x):
            return self.layer(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-4)

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(float(trainer.callback_metrics["hsu/ratio_max"]))

    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4)
    fit = trainer(
        uniformity(coefficient=0.0),
        finetuning,
        Watch(),
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=0,
    )
    fit.fit(Backbone())
    assert max(seen[:2]) < 2
    assert min(seen[-1:]) > 2


def test_one_warning_if_nothing_can_train():
    module = HeadFirst()
    module.layer.weight.requires_grad_(False)
    module.encoder.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="no layer with a coefficient trains") as caught:
        fitted(module, uniformity(coefficient=0.1))
    told = [one for one in caught if "no layer with a coefficient" in str(one.message)]
    assert len(told) == 1
    fitted(module, uniformity(coefficient=0))


# Monitors never stop a training


class Biases(BoringModel):
    """Nothing to measure."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.layer.weight.requires_grad_(False)
        del self.layer
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x[:, :2] * self.gain


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(32, 2))

    def forward(self, x):
        return x @ self.matrix


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (Biases, {}, "no neurons found"),
        (HeadFirst, {"include": "nowhere"}, "include pattern 'nowhere' matches no layer"),
        (HeadFirst, {"head": "nowhere"}, "head 'nowhere' is no layer"),
        (HeadFirst, {"neurons": {"layer": 3}}, "do not divide into 3"),
        (HeadFirst, {"exclude": "*"}, "no layer of HeadFirst is left"),
    ],
)
def test_a_monitor_warns_and_the_training_goes_on(make, settings, told):
    with pytest.raises(ValueError, match=told):
        fitted(make(), uniformity(coefficient=0.1, **settings))
    torch.manual_seed(0)
    module, plain = make(), None
    plain = copy.deepcopy(module)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match=told):
        fit, _ = fitted(module, uniformity(coefficient=0, **settings))
    assert fit.global_step == 4
    torch.manual_seed(1)
    trainer(max_steps=4, log_every_n_steps=1, limit_val_batches=0).fit(plain)
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_rule_that_fails_matters_only_where_it_is_wanted():
    class Net(HeadFirst):
        def __init__(self):
            super().__init__()
            self.layer = Broken()
            self.encoder = nn.Linear(32, 32)

    register_neurons(Broken, lambda module: module.nothing)
    try:
        with pytest.raises(AttributeError, match="nothing"):
            fitted(Net(), uniformity(coefficient=0.1))
        _, summary = fitted(Net(), uniformity(coefficient=0.1, exclude="layer"))
        assert [layer.name for layer in summary.layers] == ["encoder"]
        with pytest.warns(UserWarning, match="monitors nothing in this fit: .*nothing"):
            fitted(Net(), uniformity(coefficient=0))
    finally:
        del _RULES[Broken]


def test_neurons_is_an_argument_of_the_callback():
    callback = HypersphericalUniformity(neurons={"layer": "columns"}, verbose=False)
    _, summary = fitted(HeadFirst(), callback)
    assert {layer.name: layer.shape for layer in summary.layers} == {
        "layer": (1, 8, 2),
        "encoder": (1, 8, 32),
    }
