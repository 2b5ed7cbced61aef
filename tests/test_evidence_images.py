"""`python -m evidence.images`: published networks and recipes, controls that do what they say, runs that go on exactly."""

import copy
import json
import math
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from evidence import cells as running
from evidence import image_data, images
from evidence import image_training as training
from evidence.controls import RandomDirection
from evidence.data import MissingDataError
from evidence.documents import quoted, save_all
from evidence.files import read, write_whole
from evidence.image_data import BATCH, Batches, moved
from evidence.image_methods import callbacks, matched_coefficients, penalty
from evidence.image_networks import WIDTHS, BasicBlock, TokenBatchNorm, build, neuron_layers
from evidence.image_tables import at_better_numbers, overview, section, table
from evidence.image_training import RECIPES, Classifier, Settings, bounded_cross_entropy, train
from evidence.images import block, is_done, read_folder
from evidence.statistics import paired
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu.measures import Orthogonality
from lightning_hsu.presets import OfficialMHE
from tests.test_evidence import begun, wait_for

ROOT = Path(__file__).parents[1]
CNN9_RUNS = "evidence/results/cnn9/fashion-mnist-width16-steps2500-rate0.02/n5000"
SHAPES = [(3, 32, 32), (1, 28, 28)]
TINY = {"cnn9": 4, "resnet18": 4, "resnet18-plain": 4, "vit": 8, "vit-bn": 8}
DIGITS = Settings("digits", "cnn9", 4, 0.02, steps=4, images=256, test_every=2, accelerator="cpu")
RESUMES = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists and is not empty", "ignore:.*resuming from a checkpoint"
)


def size(network):
    return sum(p.numel() for p in network.parameters())


def test_cnn9_is_the_published_one():
    network = build("cnn9", (3, 32, 32), 100, WIDTHS["cnn9"])
    layers = UniformityRegularizer().attach(network).measure_layers()
    expected = [
        (64, 27),
        (64, 576),
        (64, 576),
        (128, 576),
        (128, 1152),
        (128, 1152),
        (256, 1152),
        (256, 2304),
        (256, 2304),
    ]
    found = [(layer.neurons, layer.dimension) for layer in layers]
    assert found == [*expected, (256, 4096), (100, 256)]


def test_resnet18_is_that_of_cifar():
    network = build("resnet18", (3, 32, 32), 10, WIDTHS["resnet18"])
    assert size(network) == 11_173_962
    plain = build("resnet18-plain", (3, 32, 32), 10, WIDTHS["resnet18"])
    # A bias a channel in place of a gain and a shift, and eight factors.
    channels = sum(layer.out_channels for layer in neuron_layers(network)[:-1])
    assert size(plain) == size(network) - channels + 8
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in plain.modules())


def test_the_vit_has_the_parameters_it_says():
    d = WIDTHS["vit"]
    layers = 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    expected = (48 * d + d) + 64 * d + 6 * (layers + 2 * 2 * d) + 2 * d + (10 * d + 10)
    assert size(build("vit", (3, 32, 32), 10, d)) == expected


def test_batch_norm_in_a_vit_differs_in_its_norms_only():
    found = {}
    for name in ("vit", "vit-bn"):
        torch.manual_seed(0)
        found[name] = build(name, (1, 28, 28), 10, 8)
    layer, batch = found.values()
    shapes = [{name: p.shape for name, p in one.named_parameters()} for one in found.values()]
    assert shapes[0] == shapes[1]
    for (name, p), q in zip(layer.named_parameters(), batch.parameters(), strict=True):
        assert torch.equal(p, q), name
    others = []
    for (name, one), other in zip(layer.named_modules(), batch.modules(), strict=True):
        if type(one) is not type(other):
            assert (type(one), type(other)) == (nn.LayerNorm, TokenBatchNorm)
            others.append(name)
    assert len(others) == 2 * 6 + 1


def test_batch_norm_of_tokens_is_over_images_and_tokens():
    x = 3.0 + 2.0 * torch.randn(5, 7, 4)
    found = TokenBatchNorm(4)(x)
    assert torch.allclose(found.mean((0, 1)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(found.var((0, 1), correction=0), torch.ones(4), atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WIDTHS)
def test_each_network_trains_on_both_shapes(name, shape):
    network = build(name, shape, 7, TINY[name])
    scores = network(torch.randint(0, 256, (3, *shape), dtype=torch.uint8))
    assert scores.shape == (3, 7)
    scores.square().sum().backward()
    for label, p in network.named_parameters():
        assert p.grad is not None, label
        assert p.grad.isfinite().all(), label
    assert neuron_layers(network)[-1] is network.score
    assert UniformityRegularizer().attach(network).measure_layers()[-1].name == "score"


def test_skip_init_begins_as_the_identity():
    block = BasicBlock(4, 4, 1, norm=False)
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.skip.fill_(1.0)
    assert not torch.equal(block(x), x)
    network = build("resnet18-plain", (1, 28, 28), 10, 4)
    assert [one.skip.item() for one in network.blocks] == [0.0] * 8


def rates(network, steps):
    """The learning rates of all steps, over the first."""
    module = Classifier(
        build(network, (1, 8, 8), 10, TINY[network]), RECIPES[network], 0.3, steps, 0
    )
    made = module.configure_optimizers()
    found = []
    for _ in range(steps):
        found.append(made["optimizer"].param_groups[0]["lr"] / 0.3)
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return found, made["optimizer"]


def test_the_rates_of_a_recipe_are_those_it_says():
    found, optimizer = rates("cnn9", 150)
    tenths = [1.0] * 60 + [0.1] * 40 + [0.01] * 30 + [0.001] * 20
    assert np.allclose(found, tenths)
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["weight_decay"] == 5e-4
    cosine = [0.5 + 0.5 * math.cos(math.pi * i / 40) for i in range(40)]
    assert np.allclose(rates("resnet18", 40)[0], cosine)
    found, optimizer = rates("vit", 40)
    falling = [0.5 + 0.5 * math.cos(math.pi * i / 38) for i in range(38)]
    assert np.allclose(found, [0.5, 1.0, *falling])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 0.05


def test_the_loss_is_the_published_one():
    scores, labels = torch.randn(7, 10, dtype=torch.float64) * 3, torch.arange(7)
    wanted = 0.99 * nn.functional.one_hot(labels, 10) + 0.001
    expected = -(wanted * (scores.softmax(1) + 1e-4).log()).sum(1).mean()
    assert math.isclose(float(bounded_cross_entropy(scores, labels)), float(expected), rel_tol=1e-6)
    saturated = bounded_cross_entropy(1e4 * torch.eye(10)[1:], torch.zeros(9, dtype=torch.long))
    assert float(saturated) < 9.22


def test_images_move_by_four_pixels_and_flip():
    images = torch.arange(2 * 12 * 12).view(1, 2, 12, 12).expand(400, -1, -1, -1)
    padded = np.pad(images[0].numpy(), ((0, 0), (4, 4), (4, 4)), mode="symmetric")
    crops = set()
    for i in range(9):
        crops |= {padded[:, i : i + 12, j : j + 12].tobytes() for j in range(9)}
    found = [
        (one.tobytes() in crops, np.ascontiguousarray(one[..., ::-1]).tobytes() in crops)
        for one in moved(images).numpy()
    ]
    assert all(a != b for a, b in found)
    assert 150 < sum(a for a, _ in found) < 250


def test_batches_are_whole_epochs_and_go_on_at_any_step():
    images = torch.arange(300).view(300, 1, 1, 1)
    whole = Batches(images, torch.arange(300), steps=5, seed=3, first=0)
    assert len(whole) == 5 * BATCH
    labels = [int(whole[i][1]) for i in range(5 * BATCH)]
    assert all(int(whole[i][0]) == labels[i] for i in range(0, 5 * BATCH, 50))
    for epoch in range(2):  # two batches each; 44 images are left out
        assert len(set(labels[2 * BATCH * epoch :][: 2 * BATCH])) == 2 * BATCH
    assert labels[: 2 * BATCH] != labels[2 * BATCH : 4 * BATCH]
    rest = Batches(images, torch.arange(300), steps=5, seed=3, first=3)
    assert [int(rest[i][1]) for i in range(2 * BATCH)] == labels[3 * BATCH :]


def test_held_out_images_judge_and_are_not_trained_on():
    data = image_data.loaded("digits")
    numbered = replace(data, pool=(data.pool[0], torch.arange(1000)))
    for count in (0, 300):
        settings = replace(DIGITS, validate=200, images=count, steps=40)
        trained_on, judged = training._datasets(numbered, settings, 5, 0)
        held = {int(label) for _, label in judged}
        seen = {int(trained_on[i][1]) for i in range(len(trained_on))}
        assert len(held) == 200
        assert not held & seen
        assert len(seen) <= (count or 800)
    judged = training._datasets(data, DIGITS, 5, 0)[1]
    assert torch.equal(judged.tensors[1], data.test[1])


@pytest.mark.any_cpu
def test_what_cannot_be_trained_on_is_refused(monkeypatch):
    training.check(DIGITS)
    for count in (100, 5000):
        with pytest.raises(MissingDataError, match="has 1000 training images; take from 128"):
            training.check(replace(DIGITS, images=count))
    with pytest.raises(MissingDataError, match="images, 900 of them held out; take from 128"):
        training.check(replace(DIGITS, validate=900, images=0))
    with pytest.raises(MissingDataError, match="make --steps 5 a multiple of --test-every 2"):
        training.check(replace(DIGITS, steps=5))
    with pytest.raises(MissingDataError, match="vit: a ViT's width is a multiple of its 4 heads"):
        training.check(replace(DIGITS, network="vit", width=6))
    with pytest.raises(ValueError, match="sides are multiples of 4; these have 10 x 8"):
        build("vit", (1, 10, 8), 10, 8)
    with pytest.raises(ValueError, match="from 8 x 8; these have 7 x 8"):
        build("cnn9", (1, 7, 8), 10, 8)
    data = image_data.loaded("digits")
    halved = replace(data, pool=(data.pool[0] / 2, data.pool[1]))
    monkeypatch.setattr(image_data, "load", lambda _: halved)
    with pytest.raises(MissingDataError, match="take whole numbers from 0 to 255"):
        image_data.loaded.__wrapped__("halved")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--seeds 0", "say either --data, to train, or --table"),
        ("--data digits --devices 2 --jobs 2 --methods none", "is what --jobs can take"),
        ("--data digits --devices 2 --methods random", "--devices 1 is what random can take"),
        ("--data digits --commit --seeds 0", "--commit takes two seeds or more"),
        ("--data digits --commit --validate 100", "keeps learning rates: take --methods none"),
        ("--data digits --commit --methods none mgd random", "beside others: add length"),
        ("--data digits --methods none length --precision 16-mixed", "behind length would take"),
        ("--data digits --methods direction --precision 16", "take bf16-mixed or 32-true"),
        ("--data digits --steps 0", "--steps: 0 is no whole number from 1"),
        ("--data digits --test-every -2", "--test-every: -2 is no whole number from 1"),
        ("--data digits --width 0", "--width: 0 is no whole number from 1"),
        ("--data digits --validate -5", "--validate: -5 is no whole number from 0"),
        ("--data digits --rate 0", "--rate is above 0"),
        ("--data digits --rate inf", "--rate is above 0 and finite"),
        ("--data digits --decay -1", "--decay is 0 or more and finite"),
        ("--data digits --decay nan", "--decay is 0 or more and finite"),
        ("--data digits --devices 2 --methods mgd_random", "is what mgd_random can take"),
        ("--data digits --methods mgd_length --precision 16", "behind mgd_length would take"),
        ("--data digits --seeds 0 4294967296", "--seeds are up to 4294967295"),
    ],
)
def test_a_line_that_cannot_be_run_is_refused(monkeypatch, capsys, line, told):
    monkeypatch.setattr(sys, "argv", ["images", *line.split()])
    with pytest.raises(SystemExit):
        images.main()
    assert told in capsys.readouterr().err


def test_results_of_other_settings_are_not_taken(tmp_path):
    path = tmp_path / "none-0.json"
    assert not is_done((DIGITS, "none", 0, path))
    asked = DIGITS.asked("none", 0)
    path.write_text(json.dumps({"asked": asked, "seed": 0, "errors": [90.0]}))
    assert is_done((DIGITS, "none", 0, path))
    other = replace(DIGITS, test_every=4)
    with pytest.raises(MissingDataError, match="with test_every = 2, not 4: name another --out"):
        is_done((other, "none", 0, path))


@pytest.mark.parametrize("content", ["", '{"asked": {"data": "dig', "[1, 2]", '{"asked": {}}'])
def test_a_result_that_is_not_whole_is_named(tmp_path, content):
    path = tmp_path / "none-0.json"
    path.write_text(content)
    with pytest.raises(
        MissingDataError, match=r"none-0\.json holds no whole result of a run: remove"
    ):
        is_done((DIGITS, "none", 0, path))
    with pytest.raises(SystemExit, match=r"none-0\.json holds no whole result of a run: remove"):
        read_folder(tmp_path)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_checkpoint_that_is_not_whole_is_named(tmp_path, size):
    last = tmp_path / "none-0" / training.LAST
    last.parent.mkdir()
    torch.save({"asked": DIGITS.asked("none", 0), "weights": torch.zeros(1000)}, last)
    last.write_bytes(last.read_bytes()[:size])
    with pytest.raises(MissingDataError, match="or remove it, and the run begins anew"):
        is_done((DIGITS, "none", 0, tmp_path / "none-0.json"))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "The same command goes on from the last checkpoints"),
        (SystemExit(1), 130, "The same command goes on from the last checkpoints"),
        (OSError(28, "No space left on device"), 2, "make room, or name another --out"),
    ],
)
def test_what_ends_runs_is_told_with_a_way_on(
    tmp_path, monkeypatch, capsys, error, status, message
):
    def fails(_):
        raise error

    monkeypatch.setattr(images, "run", fails)
    line = f"--data digits --methods none --seeds 0 --width 4 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["images", *line.split()])
    assert images.main() == status
    assert message in capsys.readouterr().err


@RESUMES
def test_checkpoints_of_other_settings_are_not_gone_on_from(tmp_path, monkeypatch, capsys):
    settings = replace(DIGITS, steps=2)
    path = tmp_path / settings.name / "none-0.json"
    found = train(settings, "none", 0, path.with_suffix(""))
    assert not is_done((settings, "none", 0, path))
    other = replace(settings, test_every=1, precision="bf16-mixed")
    told = "test_every = 2, not 1; precision = 32-true, not bf16-mixed: name another --out"
    with pytest.raises(MissingDataError, match=f"last.ckpt was made with {told}"):
        train(other, "none", 0, path.with_suffix(""))
    line = "--data digits --width 4 --rate 0.02 --steps 2 --images 256 --methods none --seeds 0"
    line += f" --test-every 1 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["images", *line.split()])
    assert images.main() == 2
    assert "test_every = 2, not 1: name another --out" in capsys.readouterr().err
    assert train(settings, "none", 0, path.with_suffix(""))["errors"] == found["errors"]


@RESUMES
def test_a_result_names_the_code_of_all_its_parts(tmp_path, monkeypatch):
    settings = replace(DIGITS, steps=2)
    assert train(settings, "none", 0, tmp_path)["code"] == [running.code(training.DECIDING)]
    monkeypatch.setattr(training, "code", lambda _: "another")
    made = train(settings, "none", 0, tmp_path)["code"]
    assert set(made) == {running.code(training.DECIDING), "another"}


@pytest.mark.any_cpu
def test_the_digest_is_of_all_modules_that_decide():
    assert running.code() == running.code(running.DECIDING)
    assert running.code(training.DECIDING) != running.code()
    for name in training.DECIDING:
        source = (ROOT / f"evidence/{name}.py").read_text()
        imported = re.findall(r"from evidence\.(\w+) import", source)
        imported += re.findall(r"from evidence import (\w+)", source)
        assert {*imported} <= {*training.DECIDING, "cells", "errors", "files"}


def test_ratios_are_those_of_half_space_but_for_the_head():
    torch.manual_seed(0)
    network = build("cnn9", (1, 8, 8), 10, 4)
    before = training.ratios(network)
    with torch.no_grad():
        for weight in (network.fc6.weight, network.score.weight):
            weight[1] = -weight[0]
    after = training.ratios(network)
    assert [*before] == [layer.name for layer in UniformityRegularizer().attach(network).layers]
    assert after["fc6"] > 10 * before["fc6"]
    assert after["score"] < 2 * before["score"]


def test_orthogonality_is_as_long_as_the_preset():
    torch.manual_seed(0)
    network = build("resnet18", (1, 28, 28), 10, 4)
    found = matched_coefficients(Orthogonality(), network)
    *hidden, head = [layer.weight for layer in neuron_layers(network)]
    for weights, coefficient, published, half_space in (
        (hidden, found[0], 1.0, True),
        ([head], found[1], 10.0, False),
    ):
        lengths = []
        for measure, factor in (
            (OfficialMHE("2", half_space=half_space), published),
            (Orthogonality(), coefficient),
        ):
            value = sum(factor * measure.penalty(weight.flatten(1)) for weight in weights)
            grads = torch.autograd.grad(value, weights)
            lengths.append(sum(float(grad.square().sum()) for grad in grads) ** 0.5)
        assert math.isclose(lengths[0], lengths[1], rel_tol=1e-4)


def test_each_method_is_what_it_says():
    network = build("cnn9", (1, 8, 8), 10, 4)
    assert callbacks("none", network) == []
    default = penalty("default", network)
    shipped = HypersphericalUniformity()
    for name in ("measure", "coefficient", "head_coefficient", "share_limit", "step_limit"):
        assert getattr(default, name) == getattr(shipped, name)
    half, random = penalty("half_mhe_2", network), penalty("random", network)
    assert half.measure == OfficialMHE("2", half_space=True)
    assert random.measure.measure == half.measure
    for name in ("coefficient", "head_coefficient", "share_limit", "step_limit"):
        assert getattr(random, name) == getattr(half, name)
    for name in ("direction", "length"):
        first, second = callbacks(name, network)
        assert first.keep == name
        assert second.measure == half.measure


@pytest.mark.parametrize("name", ["mgd", "orthogonality", "default"])
def test_a_penalty_has_controls_of_its_own(name):
    network = build("cnn9", (1, 8, 8), 10, 4)
    own = penalty(name, network)
    (random,) = callbacks(f"{name}_random", network)
    assert random.measure == RandomDirection(own.measure)
    for control in ("direction", "length"):
        first, second = callbacks(f"{name}_{control}", network)
        assert first.keep == control
        assert second.measure == own.measure
        for setting in ("coefficient", "head_coefficient", "share_limit", "step_limit"):
            assert getattr(second, setting) == getattr(own, setting) == getattr(random, setting)


def test_another_weight_decay_is_asked_for_named_and_used(monkeypatch):
    usual = replace(DIGITS, network="resnet18", width=4)
    other = replace(usual, decay=0.002)
    assert "decay" not in usual.asked("none", 0)
    assert other.asked("none", 0) == usual.asked("none", 0) | {"decay": 0.002}
    assert other.name == usual.name.replace("-n256", "-decay0.002-n256")
    assert usual.recipe == RECIPES["resnet18"]
    assert other.recipe == replace(RECIPES["resnet18"], decay=0.002)
    line = "images --data digits --network resnet18 --decay"
    for told, found in (("5e-4", None), ("0.002", 0.002), ("0", 0.0)):
        monkeypatch.setattr(sys, "argv", [*line.split(), told])
        assert images._settings(images._arguments()).decay == found


def test_a_run_takes_the_weight_decay_that_is_asked_for(tmp_path):
    """With a decay of 1 / (learning rate) a step leaves of a weight 1e-6 of the gradient."""
    rate = 1e-6 / RECIPES[DIGITS.network].factor(1, 0)
    plain = replace(DIGITS, steps=1, rate=rate, images=128, test_every=1)
    strong = replace(plain, decay=1e6)
    for settings in (plain, strong):
        train(settings, "none", 0, tmp_path / settings.name)
    kept, gone = (weights_of(tmp_path / one.name)["network.fc6.weight"] for one in (plain, strong))
    assert float(gone.norm()) < 1e-3 * float(kept.norm())


class Gradients(pl.Callback):
    """Keeps the gradients of the neurons' weights before each step."""

    def __init__(self):
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.found.append([layer.weight.grad.clone() for layer in neuron_layers(pl_module)])


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_random_directions_are_as_long_as_the_gradient_tangent_and_new():
    added = {}
    for method in ("half_mhe_2", "random"):
        torch.manual_seed(0)
        network = build("cnn9", (1, 8, 8), 10, 4).requires_grad_()
        begun_with = [layer.weight.detach().flatten(1).clone() for layer in neuron_layers(network)]
        before, after = Gradients(), Gradients()
        trainer = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[before, *callbacks(method, network), after],
        )
        module = Classifier(network, RECIPES["cnn9"], 0.0, 2, 0)  # the weights stay
        data = image_data.loaded("digits")
        taken = Batches(data.pool[0].view(-1, 1, 8, 8), data.pool[1], 2, 0, 0)
        trainer.fit(module, torch.utils.data.DataLoader(taken, BATCH))
        added[method] = []
        for task, whole in zip(before.found, after.found, strict=True):
            parts = zip(task, whole, strict=True)
            added[method].append([(b - a).flatten(1) for a, b in parts])
    for wanted, first, second, x in zip(
        added["half_mhe_2"][0], *added["random"], begun_with, strict=True
    ):
        assert torch.allclose(first.norm(dim=1), wanted.norm(dim=1), rtol=1e-3, atol=1e-5)
        unit = nn.functional.normalize(x)
        assert float((first * unit).sum(1).abs().max()) < 1e-3 * float(wanted.norm(dim=1).max())
        assert not torch.allclose(first, wanted, rtol=0.1)
        assert not torch.allclose(first, second, rtol=0.1)


def weights_of(folder):
    """The weights of the last checkpoint of a run."""
    return torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]


@pytest.fixture
def _single_again():
    yield
    torch.set_default_dtype(torch.float32)


def in_double(network, steps):
    return replace(
        DIGITS, network=network, width=TINY[network], steps=steps, test_every=steps,
        precision="64-true",
    )  # fmt: skip


@pytest.mark.usefixtures("_single_again")
@pytest.mark.parametrize("network", ["cnn9", "vit"])
@pytest.mark.parametrize("method", ["none", "half_mhe_2", "direction", "length"])
def test_a_method_does_what_a_plain_loop_does(tmp_path, method, network):
    settings = in_double(network, 3)
    train(settings, method, 7, tmp_path)
    found = weights_of(tmp_path)
    expected = dict(by_hand(settings, method, 7).named_modules())
    for name, layer in expected.items():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = found[f"network.{name}.weight"]
            assert weight.dtype == torch.float64
            rtol = 1e-5 if network == "cnn9" else 1e-9  # its loss is computed in float32
            assert torch.allclose(weight, layer.weight, rtol=rtol, atol=0.01 * rtol), name


def by_hand(settings, method, seed):
    """Three steps; a second network takes each step from the same weights without the penalty."""
    data = image_data.loaded(settings.data)
    recipe = RECIPES[settings.network]
    torch.manual_seed(seed)
    network = build(settings.network, data.shape, data.classes, settings.width).double()
    twin = copy.deepcopy(network)
    optimizers = []
    for one in (network, twin):
        module = Classifier(one, recipe, settings.rate, settings.steps, seed)
        optimizers.append(module.configure_optimizers()["optimizer"])
    taken = training._datasets(data, settings, seed, 0)[0]
    torch.set_default_dtype(torch.float64)  # as Lightning does; it decides what is drawn, too
    for step in range(settings.steps):
        batch = [taken[i] for i in range(step * BATCH, (step + 1) * BATCH)]
        pixels = torch.stack([image for image, _ in batch])
        labels = torch.stack([label for _, label in batch])
        torch.manual_seed((seed * 1_000_003 + step) * 1009)
        pixels = moved(pixels)
        twin.load_state_dict(network.state_dict())
        rate = settings.rate * recipe.factor(settings.steps, step)
        for one, optimizer in zip((network, twin), optimizers, strict=True):
            penalised = one is network and method != "none"
            step_by_hand(one, optimizer, recipe, rate, pixels, labels, penalised)
        if method in ("direction", "length"):
            put_together(network, twin, method)
    return network


def step_by_hand(network, optimizer, recipe, rate, pixels, labels, penalised):
    optimizer.zero_grad()
    scores = network(pixels)
    loss = bounded_cross_entropy if recipe.bounded else nn.functional.cross_entropy
    loss(scores, labels).backward()
    if penalised:
        *hidden, head = neuron_layers(network)
        energy = sum(OfficialMHE("2", half_space=True).penalty(x.weight.flatten(1)) for x in hidden)
        energy = energy + 10.0 * OfficialMHE("2", half_space=False).penalty(head.weight)
        energy.backward()
    if recipe.clip:
        nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()


@torch.no_grad()
def put_together(network, twin, method):
    """A neuron's direction of the one and its length of the other."""
    for with_it, without in zip(neuron_layers(network), neuron_layers(twin), strict=True):
        a, b = with_it.weight.flatten(1), without.weight.flatten(1)
        direction, length = (a, b) if method == "direction" else (b, a)
        put = nn.functional.normalize(direction) * length.norm(dim=1, keepdim=True)
        with_it.weight.copy_(put.view_as(with_it.weight))


@RESUMES
@pytest.mark.parametrize(
    ("network", "method"),
    [("cnn9", "direction"), ("vit", "direction"), ("vit-bn", "length"), ("cnn9", "random")],
)
def test_a_run_that_goes_on_is_the_same_run(tmp_path, monkeypatch, network, method):
    settings = replace(DIGITS, network=network, width=TINY[network], steps=6)
    whole = train(settings, method, 1, tmp_path / "whole")
    step = Classifier.training_step

    def ended(module, batch, index):
        if module.global_step == 3:
            raise RuntimeError("ended")
        return step(module, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", ended)
        with pytest.raises(RuntimeError, match="ended"):
            train(settings, method, 1, tmp_path / "parts")
    assert torch.load(tmp_path / "parts/last.ckpt", weights_only=False)["global_step"] == 2
    parts = train(settings, method, 1, tmp_path / "parts")
    assert len(parts["errors"]) == 3
    for name in ("errors", "ratio_before", "ratio_after"):
        assert parts[name] == whole[name]
    found, expected = weights_of(tmp_path / "parts"), weights_of(tmp_path / "whole")
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def made(method, seed, errors, ratio=1.5, finite=True):
    """A constructed result of a run."""
    return {
        "method": method,
        "seed": seed,
        "errors": errors,
        "best": min(errors),
        "finite": finite,
        "ratio_before": {"a": 1.1, "b": 1.0},
        "ratio_after": {"a": 1.0, "b": ratio},
        "seconds": 900,
        "asked": DIGITS.asked(method, seed),
    }


def constructed():
    last = {
        "none": [20.0, 22.0, 24.0],
        "half_mhe_2": [19.0, 20.5, 23.0],
        "random": [20.5, 21.5, 24.5],
        "length": [19.5, 20.0, 23.5],
    }
    runs = []
    for method, errors in last.items():
        runs += [made(method, seed, [18.0, error]) for seed, error in enumerate(errors)]
    return runs, last


def test_the_table_tells_changes_from_none_and_from_the_controls():
    runs, last = constructed()
    runs[3]["ratio_after"]["b"] = None
    runs[4] |= {"finite": False}
    lines = [line.split(" | ") for line in table(runs[::-1]).splitlines()]
    assert lines[0][6:9] == ["from random", "from length", "p beyond all (Holm)"]
    assert [line[0] for line in lines[2:]] == ["| none", "| half_mhe_2", "| random", "| length"]
    cells = lines[3]
    assert cells[1:3] == ["20.83 (1.17)", "18.00"]
    assert cells[3] == "-1.17 (0.17), 3/3"
    assert cells[4] == f"{4.302653 / 6:.2f}"  # Student's t of two degrees of freedom, times 1/6
    p = paired(last["half_mhe_2"], last["none"]).p
    assert cells[5] == f"{3 * p:.2g}"  # the smallest of three
    assert cells[6] == "-1.33 (0.17), 3/3"
    assert cells[7] == "-0.17 (0.33), 2/3"
    assert cells[8] == f"{paired(last['half_mhe_2'], last['length']).p:.2g}"  # the largest
    assert cells[9] == "1.10 → 1.33"  # of 1.0, 1.5 and 1.5
    assert cells[10] == "1 |"
    assert lines[2][3:9] == [""] * 6
    assert lines[4][6] == ""
    assert lines[4][8] == ""
    assert lines[5][6].startswith("-1.17 (")
    assert lines[5][8] == ""


def test_what_is_beyond_all_is_corrected_for_the_penalties_alone():
    runs, last = constructed()
    more = {
        "mgd": [15.0, 16.0, 18.0],
        "direction": [15.0, 16.1, 18.0],
        "default": [20.2, 21.6, 24.0],  # lower than none and random, higher than length
    }
    for method, errors in more.items():
        runs += [made(method, seed, [error]) for seed, error in enumerate(errors)]
    rows = [line.split(" | ") for line in table(runs).splitlines()]
    beyond = {row[0].removeprefix("| "): row[8] for row in rows}
    largest = max(paired(more["mgd"], last[name]).p for name in ("none", "random", "length"))
    assert 3 * largest < 1
    assert beyond["mgd"] == f"{3 * largest:.2g}"
    assert beyond["default"] == "1"
    assert {beyond[name] for name in ("none", "random", "direction", "length")} == {""}
    without = table([one for one in runs if one["method"] != "length"])
    assert "from random" in without
    assert "beyond" not in without


def test_only_seeds_that_all_methods_have_count():
    runs, _ = constructed()
    alike = table([one for one in runs if one["seed"] < 2])
    assert "left out" not in alike
    told = "Only seeds that all methods have count, 2; runs left out: 3."
    assert table(runs[:-1]) == f"{alike}\n\n{told}"
    one_seed = table([one for one in runs if one["seed"] == 0]).splitlines()
    assert "from random" not in one_seed[0]
    assert one_seed[3].startswith("| half_mhe_2 | 19.00 | 18.00 |  |  |  |")
    assert "from random" not in table(runs[:6])
    with pytest.raises(SystemExit, match="no seed that all methods have"):
        table([runs[0], runs[4]])


def test_controls_of_its_own_are_compared_with_their_penalty_alone():
    runs, last = constructed()
    more = {
        "mgd": [15.0, 16.0, 18.0],
        "mgd_random": [16.0, 17.1, 18.8],
        "mgd_length": [14.9, 16.3, 18.1],
    }
    for method, errors in more.items():
        runs += [made(method, seed, [error]) for seed, error in enumerate(errors)]
    rows = [line.removeprefix("| ").split(" | ") for line in table(runs).splitlines()]
    at = rows[0].index("from its own random")
    assert rows[0][at : at + 3] == [
        "from its own random",
        "from its own length",
        "p beyond its own (Holm)",
    ]
    told = {row[0]: row[at : at + 3] for row in rows[2:]}
    differences = [paired(more["mgd"], more[f"mgd_{name}"]) for name in ("random", "length")]
    p = max(one.p for one in [*differences, paired(more["mgd"], last["none"])])
    assert told.pop("mgd") == ["-0.97 (0.09), 3/3", "-0.10 (0.12), 2/3", f"{p:.2g}"]
    assert {*map(tuple, told.values())} == {("", "", "")}
    beyond = {row[0]: row[8] for row in rows[2:]}
    assert beyond["mgd_random"] == beyond["mgd_length"] == ""  # no penalties
    assert beyond["mgd"] != ""
    assert "its own" not in table([run for run in runs if run["method"] != "mgd_length"])


def test_runs_of_other_settings_are_not_in_one_table(tmp_path):
    for run in constructed()[0]:
        path = tmp_path / f"{run['method']}-{run['seed']}.json"
        path.write_text(json.dumps(run))
    assert len(read_folder(tmp_path)) == 12
    run["asked"]["precision"] = "bf16-mixed"
    path.write_text(json.dumps(run))
    with pytest.raises(SystemExit, match=f"{path.name} was made with other settings than"):
        read_folder(tmp_path)


def test_a_section_says_what_was_run():
    head = section(constructed()[0]).splitlines()[0]
    decayed = constructed()[0]
    for one in decayed:
        one["asked"]["decay"] = 0.002
    assert "learning rate 0.02, weight decay 0.002, seeds" in section(decayed)
    assert head == (
        "**scikit-learn's digits, CNN-9**, width 4, 256 training images, 4 steps of 128 images, "
        "learning rate 0.02, seeds 0 to 2, judged on test images; 3.00 core hours."
    )
    runs = constructed()[0]
    for one in runs:
        one["code"] = ["one"]
    assert section(runs).splitlines()[0] == head
    runs[3]["code"] = ["one", "two"]
    del runs[5]["code"]
    assert "3.00 core hours, made by 3 versions of the code." in section(runs)


def test_other_seeds_have_a_file_of_their_own_and_fewer_give_way_to_more(tmp_path):
    def names_after(*seeds):
        images.keep([made("none", seed, [1.0]) for seed in seeds], tmp_path, "a")
        return sorted(path.name for path in tmp_path.iterdir())

    assert names_after(0, 1) == ["a-seeds0to1.json"]
    assert names_after(4) == ["a-seeds0to1.json", "a-seeds4.json"]
    assert names_after(0, 1, 2, 4) == ["a-seeds0+1+2+4.json"]
    assert names_after(5, 6, 7) == ["a-seeds0+1+2+4.json", "a-seeds5to7.json"]
    assert names_after(1, 2) == ["a-seeds0+1+2+4.json", "a-seeds1to2.json", "a-seeds5to7.json"]


def test_what_other_methods_were_kept_stays(tmp_path):
    def kept_after(*methods, seeds=(0, 1), replace=True):
        runs = [made(method, seed, [1.0]) for method in methods for seed in seeds]
        images.keep(runs, tmp_path, "a", replace)
        found = {}
        for path in tmp_path.iterdir():
            found[path.name] = sorted((one["method"], one["seed"]) for one in read(path))
        return found

    def of(*methods, seeds=(0, 1)):
        return sorted((method, seed) for method in methods for seed in seeds)

    assert kept_after("none", "mgd") == {"a-seeds0to1.json": of("none", "mgd")}
    assert kept_after("none", "random") == {"a-seeds0to1.json": of("none", "mgd", "random")}
    fewer = kept_after("none", seeds=(0, 1, 2))  # has not what the first file has of mgd
    assert fewer == {
        "a-seeds0to1.json": of("none", "mgd", "random"),
        "a-seeds0to2.json": of("none", seeds=(0, 1, 2)),
    }
    more = kept_after("none", "mgd", "random", seeds=(0, 1, 2))
    assert more == {"a-seeds0to2.json": of("none", "mgd", "random", seeds=(0, 1, 2))}
    assert [*kept_after("none", seeds=(0, 1, 2, 3), replace=False)] != ["a-seeds0to3.json"]
    assert len([*tmp_path.iterdir()]) == 2


def test_each_method_is_told_at_its_better_learning_rate(tmp_path, monkeypatch):
    """Orthogonality stands for those that are better at the second; none is run there alone."""
    runs, _ = constructed()
    runs += [made("orthogonality", seed, [error]) for seed, error in enumerate([21.0, 22.0, 23.0])]
    others = copy.deepcopy(runs)
    for one in others:
        one["asked"]["rate"] = 0.04
        one["errors"] = [one["errors"][-1] + 1]
        if one["method"] == "orthogonality":
            one["errors"] = [one["errors"][-1] - 3]
    alone = [copy.deepcopy(one) for one in runs if one["method"] == "none"]
    for one in alone:
        one["asked"]["decay"] = 0.002
        one["errors"] = [one["errors"][-1] - 0.5]
    (told,) = at_better_numbers([runs, others, alone])
    head, _, *rows = told.splitlines()
    assert head.endswith(
        "seeds 0 to 2: none at 0.02, weight decay 0.002; half_mhe_2, random, length at 0.02; "
        "orthogonality at 0.04."
    )
    best = [one for one in runs if one["method"] not in ("none", "orthogonality")] + alone
    best += [one for one in others if one["method"] == "orthogonality"]
    assert "\n".join(rows) == table(best)
    assert at_better_numbers([runs]) == []
    elsewhere = copy.deepcopy(others)
    for one in elsewhere:
        one["seed"] += 3
    assert at_better_numbers([runs, elsewhere]) == []
    monkeypatch.setattr(images, "RESULTS", tmp_path)
    for name, kept in (("a", runs), ("b", others), ("c", alone)):
        save_all(kept, tmp_path / f"{name}.json")
    assert told in block()
    assert section(alone) in block()
    assert len(images.summary().splitlines()) == 2 + 2  # what has no controls is not there


def written_in(folder, monkeypatch):
    """What --commit writes is written there."""
    monkeypatch.setattr(images, "RESULTS", folder / "results")
    for name in ("README", "PAGE"):
        path = folder / f"{name}.md"
        path.write_text("\n\n".join(["Before.", *images.MARKS, "After."]))
        monkeypatch.setattr(images, name, path)


def test_learning_rates_are_kept_and_the_best_is_bold(tmp_path, monkeypatch, capsys):
    written_in(tmp_path, monkeypatch)
    held_out = {"0.01": 30.0, "0.02": 20.0, "0.1": 25.0}

    def run(job):
        settings, method, seed, path = job
        found = made(method, seed, [40.0, held_out[f"{settings.rate:g}"]])
        write_whole(path, json.dumps(found | {"asked": settings.asked(method, seed)}))

    monkeypatch.setattr(images, "run", run)
    what = "--data digits --images 256 --width 4 --steps 4 --methods none --seeds 1000"
    line = [*what.split(), "--validate", "100", "--out", str(tmp_path / "out"), "--commit"]
    for rate in held_out:
        monkeypatch.setattr(sys, "argv", ["images", *line, "--rate", rate])
        assert images.main() == 0
    more = ["--seeds", "1000", "1001", "--rate", "0.1", "--decay", "0.001"]
    monkeypatch.setattr(sys, "argv", ["images", *line, *more])
    assert images.main() == 0
    kept = sorted(path.name for path in (tmp_path / "results/rates").iterdir())
    start = "digits-cnn9-width4-steps4-rate"
    expected = [f"{start}{rate}-n256-validate100-seeds1000.json" for rate in held_out]
    expected.append(f"{start}0.1-decay0.001-n256-validate100-seeds1000to1001.json")
    assert kept == sorted(expected)
    lines = (tmp_path / "README.md").read_text().splitlines()
    network = "scikit-learn's digits, CNN-9, width 4, 256 training images, 4 steps of 128 images"
    assert lines[lines.index("| --- | --- | --- | --- | --- | --- |") + 1 :][:5] == [
        f"| {network} | 100 | 1000 | 0.01 | 0.0005 | 30.00 |",
        f"| {network} | 100 | 1000 | **0.02** | **0.0005** | **20.00** |",
        f"| {network} | 100 | 1000 | 0.1 | 0.0005 | 25.00 |",
        f"| {network} | 100 | 1000 to 1001 | **0.1** | **0.001** | **25.00** |",
        "",
    ]


def test_when_a_run_fails_no_other_is_begun(monkeypatch):
    begun_with = []

    def run(job):
        begun_with.append(job)
        if job == 0:
            raise MissingDataError("gone")
        time.sleep(0.3)

    monkeypatch.setattr(images, "run", run)
    monkeypatch.setattr(images, "ProcessPoolExecutor", lambda count, *_: ThreadPoolExecutor(count))
    monkeypatch.setattr(running, "keep_freed_memory", lambda: None)
    with pytest.raises(MissingDataError, match="gone"):
        images._run_beside(range(8), 1)
    assert 7 not in begun_with


def test_the_readme_names_the_networks_without_results(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RESULTS", tmp_path)
    assert block() == "Not run."
    runs = constructed()[0]
    for network in WIDTHS:
        for one in runs:
            one["asked"]["network"] = network
        save_all(runs, tmp_path / f"{network}.json")
        told = block()
        assert section(runs) in told
        assert ("**No results yet:**" in told) == (network != "vit-bn")
        if network == "resnet18-plain":
            assert "**No results yet:** ViT, ViT with batch norm.\n" in told


def test_its_own_readme_quotes_the_committed_images():
    for path, told in ((images.README, block()), (images.PAGE, images.summary())):
        text = path.read_text()
        assert quoted(text, told, images.MARKS) == text


def test_a_row_a_network_has_what_its_table_says(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "RESULTS", tmp_path)
    assert images.summary() == "Not run."
    runs = constructed()[0]
    save_all(runs, tmp_path / "one.json")
    head, _, row = images.summary().splitlines()
    cells = row.split(" | ")
    told = dict(zip(head.split(" | "), cells, strict=True))
    for line in table(runs).splitlines()[2:]:
        name, last, _, change, *_ = line.removeprefix("| ").split(" | ")
        assert told["no penalty" if name == "none" else name] == (change or last)
    assert told["seeds"] == "0 to 2"
    assert cells[-1] == "– |"
    save_all(runs[:-1], tmp_path / "one.json")  # one method has not the last seed
    assert " | 0 to 1 | " in images.summary()


def test_the_overview_names_what_is_beyond_its_controls():
    """Both penalties are 0.1 to 0.3 lower than all: one p of 0.03 and one of 0.006 in two is a gain."""
    last = {
        "none": [20.0, 22.0, 24.0],
        "random": [20.1, 22.0, 24.1],
        "length": [20.1, 22.1, 24.0],
        "mgd": [16.0, 18.1, 20.0],
        "mgd_random": [19.0, 21.2, 23.0],
        "mgd_length": [19.0, 21.0, 23.1],
        "orthogonality": [17.0, 18.0, 21.8],
        "orthogonality_random": [20.1, 22.0, 24.1],
        "orthogonality_length": [20.1, 22.1, 24.0],
    }
    runs = []
    for method, errors in last.items():
        runs += [made(method, seed, [error]) for seed, error in enumerate(errors)]

    def ends(*names):
        chosen = [one for one in runs if one["method"] in ("none", "random", "length", *names)]
        head, _, row = overview([chosen]).splitlines()
        columns = [cell.strip() for cell in head.strip("| ").split("|")]
        cells = [cell.strip() for cell in row.strip().strip("|").split("|")]
        told = dict(zip(columns, cells, strict=True))
        return told["beyond all"], told.get("beyond all of its own")

    own = ("mgd", "mgd_random", "mgd_length")
    rival = ("orthogonality", "orthogonality_random", "orthogonality_length")
    assert ends() == ("–", None)
    assert ends("mgd") == ("mgd", None)
    assert ends(*own) == ("mgd", "mgd")
    largest = max(
        paired(last["orthogonality"], last[name]).p for name in ("none", "random", "length")
    )
    assert 0.025 < largest < 0.05
    assert ends(*rival) == ("orthogonality", "orthogonality")
    # Beside another penalty the larger p stays as it is, the smaller one is doubled.
    assert ends(*own, *rival) == ("mgd, orthogonality", "mgd, orthogonality")
    for one in runs:  # no lower than its own controls any more
        if one["method"] == "mgd_length":
            one["errors"] = [one["errors"][0] - 3]
    assert ends(*own) == ("mgd", "–")


def test_the_readme_has_the_committed_runs_of_the_published_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["images", "--table", str(ROOT / CNN9_RUNS)])
    assert images.main() == 0
    told = capsys.readouterr().out.strip()
    assert told in (ROOT / "docs/evidence.md").read_text()
    assert len(told.splitlines()) == 2 + 3
    assert len(read_folder(ROOT / CNN9_RUNS)) == 3 * 5
    with pytest.raises(SystemExit, match="holds no result of a run"):
        read_folder(ROOT / "evidence/results")


def test_a_committed_table_is_printed(monkeypatch, capsys, tmp_path):
    kept = sorted(images.RESULTS.glob("*.json"))[0]
    monkeypatch.setattr(sys, "argv", ["images", "--table", str(kept)])
    assert images.main() == 0
    assert capsys.readouterr().out.strip() in images.README.read_text()
    monkeypatch.setattr(sys, "argv", ["images", "--table", str(kept.parent)])
    with pytest.raises(SystemExit, match=rf"holds all runs of a table: --table {kept} prints it"):
        images.main()
    other = tmp_path / "other.json"
    monkeypatch.setattr(sys, "argv", ["images", "--table", str(other)])
    for content in ("[{}]", "[]", "{}", "["):
        other.write_text(content)
        with pytest.raises(SystemExit, match="holds no runs that --commit has kept"):
            images.main()


@pytest.mark.slow
@RESUMES
def test_images_go_on_from_their_last_checkpoints_and_are_committed(tmp_path, monkeypatch, capsys):
    what = "--data digits --images 512 --methods none half_mhe_2 random length --seeds 0 1"
    how = "--width 4 --steps 6 --test-every 2 --accelerator cpu"
    arguments = [*what.split(), *how.split()]
    folder = tmp_path / "out/images/digits-cnn9-width4-steps6-rate0.1-n512"
    with begun("evidence.images", arguments, tmp_path) as run:
        wait_for((folder / "none-0/last.ckpt").exists)
        run.kill()
    assert not (folder / "length-1.json").exists()
    monkeypatch.chdir(tmp_path)
    written_in(tmp_path, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["images", *arguments, "--jobs", "2", "--commit"])
    assert images.main() == 0
    printed = capsys.readouterr().out
    assert re.search(r"\| half_mhe_2 \| \d+\.\d\d \(\d+\.\d\d\) \|", printed)
    assert not (folder / "none-0").exists()  # its checkpoints are of no use any more
    found = {one["method"]: one for one in read_folder(folder) if one["seed"] == 0}
    assert all(len(one["errors"]) == 3 for one in found.values())
    assert found["none"]["ratio_before"] == found["half_mhe_2"]["ratio_before"]
    assert found["none"]["ratio_after"] != found["half_mhe_2"]["ratio_after"]
    told, where = printed[printed.index("**scikit") :].strip().split("\n\nResults: ")
    assert (tmp_path / where).samefile(folder)
    written = (tmp_path / "README.md").read_text()
    assert told in written
    assert images.summary() in images.PAGE.read_text()
    assert written.startswith("Before.")
    assert written.endswith("After.")
    (committed,) = (tmp_path / "results").glob("*.json")
    assert read(committed) == [
        json.loads((folder / f"{method}-{seed}.json").read_text())
        for seed in (0, 1)
        for method in ("none", "half_mhe_2", "random", "length")
    ]  # fmt: skip
    monkeypatch.setattr(images, "run", None)  # nothing is left to do
    assert images.main() == 0
    assert capsys.readouterr().out.strip() == f"{told}\n\nResults: {where}"
