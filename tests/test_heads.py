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
from tests.plain import HALF_SPACE
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
    callback = uniformity(measure=HALF_SPACE, coefficient=0.3, apply=apply)
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


# What graphs of real programs look like


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


def traced(model, loss):
    regularizer = UniformityRegularizer().attach(model, watch=False)
    regularizer.find_head(loss)
    return [layer.name for layer in regularizer.layers if layer.target.head]


def two(width=8):
    return nn.ModuleDict({"enc": nn.Linear(6, width), "out": nn.Linear(width, 3)})


def test_of_a_residual_stream_only_the_newest_layer_is_last():
    model = nn.Sequential(nn.Embedding(9, 8), Block(), Block(), Block())
    assert traced(model, model(torch.arange(9)).square().mean()) == ["3.second"]
    model = nn.ModuleDict({"enc": nn.Linear(6, 8), "out": nn.Linear(8, 8)})
    hidden = model["enc"](torch.randn(4, 6))
    assert traced(model, (hidden + model["out"](hidden)).square().mean()) == ["out"]


def test_an_output_that_is_divided_is_last():
    """As in N-BEATS: a part of it goes on, another part is a part of the result."""
    model = nn.ModuleList([nn.Linear(6, 9) for _ in range(3)])
    x, total = torch.randn(4, 6), 0.0
    for layer in model:
        out = layer(x)
        x, total = x - out[:, :6], total + out[:, 6:]
    assert set(traced(model, total.square().mean())) == {"0", "1", "2"}


def test_a_penalty_on_gradients_has_no_head_of_its_own():
    model = two()
    x = torch.randn(4, 6).requires_grad_()
    loss = model["out"](model["enc"](x).tanh()).tanh().square().mean()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert traced(model, loss + grad.square().mean()) == ["out"]


def test_a_penalty_on_weights_or_on_features_has_no_head_of_its_own():
    model = two()
    x = torch.randn(4, 6)
    loss = model["out"](model["enc"](x).tanh()).square().mean()
    weight = model["enc"].weight
    assert traced(model, loss + (weight @ weight.T).square().sum()) == ["out"]
    assert traced(model, loss + model["enc"](x).abs().mean()) == ["out"]
    assert traced(model, loss + 0.1 * weight.square().sum()) == ["out"]


def test_tables_that_are_added_looked_up_or_multiplied_by_entry_are_no_heads():
    model = nn.ModuleDict(
        {"pos": nn.Embedding(4, 8), "mix": nn.Linear(8, 8), "out": nn.Linear(8, 3)}
    )
    x = torch.randn(4, 8) + model["pos"].weight
    assert traced(model, model["out"](x + model["mix"](x)).square().mean()) == ["out"]
    x = torch.randn(4, 8) * model["pos"].weight
    assert traced(model, model["out"](x).square().mean()) == ["out"]
    words = nn.ModuleDict({"user": nn.Embedding(5, 8), "item": nn.Embedding(5, 8)})
    product = words["user"](torch.arange(5)) * words["item"](torch.arange(5))
    regularizer = UniformityRegularizer(neurons={"user": "rows"}).attach(words, watch=False)
    regularizer.find_head(product.sum(-1).mean())
    assert [(one.name, one.target.head) for one in regularizer.layers] == [("user", False)]


def test_weights_that_are_not_measured_may_be_last_and_then_no_other_layer_is():
    model = two()
    model.weight = nn.Parameter(torch.randn(5, 8))
    x = nn.functional.normalize(model["enc"](torch.randn(4, 6)))
    logits = nn.functional.linear(x, nn.functional.normalize(model.weight))
    assert traced(model, logits.logsumexp(1).mean()) == []


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.weight_norm]
)
def test_a_parametrized_head_is_found(wrap):
    model = two()
    wrap(model["out"])
    loss = model["out"](model["enc"](torch.randn(4, 6)).tanh()).square().mean()
    assert traced(model, loss) == ["out"]


def test_behind_a_reentrant_checkpoint_nothing_is_known():
    model = two()

    def last(x):
        return model["out"](x.tanh())

    x = torch.utils.checkpoint.checkpoint(last, model["enc"](torch.randn(4, 6)), use_reentrant=True)
    regularizer = UniformityRegularizer().attach(model, watch=False)
    regularizer.find_head(x.square().mean())
    assert heads(regularizer.summary) == {"out": "guessed: last Linear"}


class Declaring(nn.Module):
    """As timm's: it says what its classifier is."""

    def __init__(self):
        super().__init__()
        self.trunk, self.fc = nn.Linear(6, 8), nn.Linear(8, 3)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(self.trunk(x).relu())


def test_what_is_declared_may_be_unused_frozen_or_not_alone():
    model = nn.ModuleDict({"net": Declaring(), "own": nn.Linear(8, 2)})
    x = model["net"].trunk(torch.randn(4, 6)).relu()
    both = model["net"].fc(x).square().mean() + model["own"](x).square().mean()
    assert set(traced(model, both)) == {"net.fc", "own"}
    assert traced(model, model["own"](x).square().mean()) == ["own"]
    model["net"].fc.requires_grad_(False)
    assert traced(model, model["own"](x).square().mean()) == ["own"]
    net = Declaring()
    net.fc.requires_grad_(False)  # it leaves no trace
    assert traced(net, net(torch.randn(4, 6)).square().mean()) == ["fc"]


def test_many_outputs_are_all_heads():
    model = nn.ModuleList([nn.Linear(6, 3) for _ in range(40)])
    x = torch.randn(4, 6)
    assert len(traced(model, [layer(x) for layer in model])) == 40


def test_a_first_batch_without_a_loss():
    class FirstNone(HeadFirst):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    _, summary = fitted(FirstNone())
    assert heads(summary) == {"layer": "last before the loss"}


# Lives of a regularizer


def test_heads_that_are_loaded_after_attach_count():
    model = HeadFirst()
    regularizer = UniformityRegularizer().attach(model)
    regularizer.load_state_dict({"steps": [3], "heads": ["layer"]})
    assert heads(regularizer.summary) == {"layer": "last before the loss"}
    assert not model._forward_hooks


def test_what_the_user_shows_counts_more_than_what_was_watched():
    model = HeadFirst()
    regularizer = UniformityRegularizer().attach(model)
    hidden = model.encoder(torch.randn(3, 32))
    model(torch.randn(3, 32))
    assert set(heads(regularizer.summary)) == {"layer"}
    regularizer.find_head(hidden.square().mean())
    assert set(heads(regularizer.summary)) == {"encoder"}


@pytest.mark.parametrize("apply", ["gradient", "loss", "decoupled"])
def test_copies_and_frozen_layers_never_move(apply):
    class Copied(HeadFirst):
        def __init__(self):
            super().__init__()
            self.average = AveragedModel(self.encoder)
            self.still = nn.Linear(32, 8)
            self.still.weight.requires_grad_(False)

        def training_step(self, batch, batch_idx):
            return self(batch).square().mean() + 0.0 * self.still(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Copied()
    before = [module.average.module.weight.clone(), module.still.weight.clone()]
    fitted(module, uniformity(coefficient=0.5, apply=apply))
    assert torch.equal(module.average.module.weight, before[0])
    assert torch.equal(module.still.weight, before[1])


class EuclideanCodebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("embed", torch.randn(6, 8))


def test_a_codebook_in_a_buffer_is_measured_while_it_moves(tmp_path):
    class Quantized(HeadFirst):
        def __init__(self):
            super().__init__()
            self.codes = EuclideanCodebook()

        def training_step(self, batch, batch_idx):
            self.codes.embed.lerp_(torch.ones(8), 0.3)
            return super().training_step(batch, batch_idx)

    _, summary = fitted(Quantized(), uniformity(coefficient=0.1), logger=CSVLogger(tmp_path))
    codes = next(layer for layer in summary.layers if layer.name == "codes.embed")
    assert (codes.trainable, codes.frozen, codes.is_head) == (False, False, False)
    rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("hsu/ratio/codes.embed")
    seen = {row.split(",")[column] for row in rows[1:]} - {""}
    assert len(seen) == 4


class Adversarial(pl.LightningModule):
    """A generator and a discriminator with toggled optimizers."""

    def __init__(self, first):
        super().__init__()
        self.automatic_optimization = False
        self.nets = nn.ModuleDict(
            {
                "d": nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
                "g": nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 12)),
            }
        )
        self.order = [first, "g" if first == "d" else "d"]

    def training_step(self, batch, batch_idx):
        for name, optimizer in zip(self.order, self.optimizers(), strict=True):
            self.toggle_optimizer(optimizer)
            made = self.nets["g"](batch)
            loss = self.nets["d"](made if name == "g" else made.detach()).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.nets[name].parameters(), lr=0.01) for name in self.order]

    train_dataloader = BoringModel.train_dataloader


@pytest.mark.parametrize("first", ["d", "g"])
def test_toggled_networks_are_not_frozen_and_keep_one_measure(first, caplog):
    with caplog.at_level("INFO"):
        _, summary = fitted(Adversarial(first), uniformity(verbose=True, coefficient=0.1))
    start, after = (
        record.message
        for record in caplog.records
        if record.message.startswith("Hyperspherical") and "\n" in record.message
    )
    assert "frozen" not in start
    assert set(heads(summary)) == {"nets.d.2", "nets.g.2"}
    assert all(layer.trainable for layer in summary.layers)
    assert "nets.g.2" in after


def test_one_warning_where_all_weights_are_quantised():
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale = torch.ones(())
    with pytest.warns(UserWarning, match="no layer with a coefficient trains"):
        UniformityRegularizer(head=None).attach(layer)
