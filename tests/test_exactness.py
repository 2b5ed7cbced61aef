"""What the callback does to training, situation by situation: the README's table, each row a test.

After several steps the parameters equal those of a plain torch loop (tests/plain.py), which knows nothing of the engine.
``python -m tests.compatibility`` prints the table.
"""

import ast
import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.plugins import MixedPrecision
from packaging.version import Version
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW

from lightning_hsu import CosineSchedule, LinearSchedule, Share
from tests import models, plain
from tests.compatibility import MODES, split_readme, table
from tests.models import Adversarial, Automatic, Manual, batches, loader, trainer, uniformity

TOLERANCE = 1e-6  # measured: at most 3e-7
HALF_TOLERANCE = 5e-5  # a weight on a rounding edge of float16 or bfloat16 lets a last bit grow; measured: 8.3e-6


@dataclass(frozen=True)
class Outcome:
    """What the README says of one mode, and what the test holds: an error, or parameters as in the plain loop."""

    cell: str = "exact"
    error: tuple[type[Exception], ...] = ()
    message: str = ""  # of the error, or of a warning
    mode: str | None = None  # that of the plain loop, where it is another


def sgd(parameters):
    return SGD(parameters, lr=0.1, momentum=0.9)


def half(step, layer):
    """The coefficient of most rows."""
    return 0.5


@dataclass(frozen=True)
class Situation:
    """One row.

    Args:
        text: What the README calls it; rows with the same text are one there, those without are left out.
        name: What the test calls it.
        gradient: What happens with ``apply="gradient"``; ``loss`` and ``decoupled`` alike.
        trainer: Settings of the Trainer.
        callback: Settings of the callback; a tuple of them is as many callbacks.
        module: Makes the module, given the factory of its optimizer, which is ``optimizer``.
        beside: Makes other callbacks, which go first.
        prepare: Takes the callback before it is used.
        compiled: Takes the module after its twin was made.
        fit: Takes Trainer, module and data.
        scaler: Settings of a GradScaler; the forward pass is then in float16.
        dtype: That of parameters and data.
        count: Batches an epoch.
        loop: The plain loop; ``settings`` are its own.
        layers: Those of the plain loop, by its module.
        strength: The plain loop's coefficient after that many steps, by layer; ``every`` is its ``every_n_steps``.
        where: The tests that hold this row, ``tests/test_file.py::test_name``, if they are others.
        kept: What the README says of kept gradients, which test_keeps_gradients... holds, or ``where``.
        since: The release of Lightning that has it.
    """

    text: str | None
    name: str
    gradient: Outcome = Outcome()
    loss: Outcome = Outcome()
    decoupled: Outcome = Outcome()
    trainer: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] | tuple[dict[str, Any], ...] = field(default_factory=dict)
    module: Callable[..., Any] = Automatic
    optimizer: Callable[..., Any] = sgd
    beside: Callable[[], list[Any]] = list
    prepare: Callable[[Any], Any] = lambda callback: callback
    compiled: Callable[[Any], Any] = lambda module: module
    fit: Callable[..., Any] = lambda trainer, module, data: trainer.fit(module, loader(data))
    scaler: dict[str, float] | None = None
    dtype: torch.dtype = torch.float32
    count: int = 5
    loop: Callable[..., Any] = plain.train
    settings: dict[str, Any] = field(default_factory=dict)
    layers: Callable[..., list[plain.Layer]] = lambda module: plain.layers(module.net)
    strength: Callable[[int, str], Any] = half
    every: int = 1
    where: tuple[str, ...] = ()
    kept: str = "exact"
    since: str = "2.4"

    @property
    def tolerance(self) -> float:
        return HALF_TOLERANCE if self.scaler or "autocast" in self.settings else TOLERANCE


def exact(note, **kwargs):
    return Outcome(f"exact, {note}", **kwargs)


def refused(message):
    return Outcome("error: use gradient", (NotImplementedError, ValueError), message)


def by_layer(default, **own):
    """A strength for the plain loop: ``net_5=0.3`` is that of net.5, a number or a function of the step."""

    def strength(step, layer):
        given = own.get(layer.replace(".", "_"), default)
        return given(step) if callable(given) else given

    return strength


def rising(step, layer=None):
    return 0.1 * step


def thawed(parameters):
    return SGD([p for p in parameters if p.requires_grad], lr=0.1)


def in_two_groups(parameters):
    first, *rest = parameters
    return SGD([{"params": first, "lr": 0.05}, {"params": rest}], lr=0.1, momentum=0.9)


def biases_faster(parameters):
    parameters = list(parameters)
    weights, biases = (
        [p for p in parameters if (p.ndim > 1) == wanted] for wanted in (True, False)
    )
    return SGD([{"params": weights}, {"params": biases, "lr": 0.3}], lr=0.03)


def with_net(make):
    return lambda make_optimizer: Automatic(make_optimizer, net=make())


def clip_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.3)


def clip_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.02)


PRECISION = "fp32, bf16-mixed, 64-true; SGD, Adam, AdamW, fused too"
SCALER = "16-mixed with a GradScaler, fused optimizers and steps that overflow too"
ACCUMULATION = "`accumulate_grad_batches=N`, also with a short last window"
CLIP = "`gradient_clip_val`, by norm or by value"
MANUAL = "manual optimisation, any number of `manual_backward` calls and of batches a step"
GAN = "two optimizers, with and without `toggle_optimizer`: each with its own parameters"
CLOSURE = "optimizers that call their closure twice (LBFGS, SAM), or without recording gradients"
GROUPS = "parameter groups with their own learning rates"
FROZEN = "frozen layers, also unfrozen later (BaseFinetuning, BackboneFinetuning)"
COMPUTED = "ModelPruning; `weight_norm` and other computed weights"
WEIGHTS = "weights with several sets of neurons (LSTM, attention), transposed convolutions, `channels_last`"
AVERAGE = "StochasticWeightAveraging, EMAWeightAveraging"
COMPILE = "`torch.compile` of a part, or of the LightningModule"
STRENGTH = "`every_n_steps`, schedules, a coefficient by layer or for the head"
SHARE = "`coefficient=Share(...)`"
TRAINER = "`fast_dev_run`, `overfit_batches`, `barebones`, no logger, `log_every_n_steps=0`"
INSTANCES = "two callbacks, each with its own `prefix`; one used twice, copied, unpickled, resumed from a checkpoint"

clipped, unclipped = exact("clipped with the rest"), exact("never clipped")
not_manual = refused(r"apply='loss'.*manual optimi[sz]ation.*apply='gradient'")
not_share = refused(r"Share.*apply='gradient'")
short = exact("1/N of it in every micro-batch")
computed = exact("the parameters behind move")
searched = exact("but the search does not see it: a warning", message="LBFGS with a line search")
alone = Outcome("left alone, with a warning", message="the penalty has not reached layer 'net.5'")
absent = Outcome("absent, with a warning", message="the penalty has not reached layer", mode="none")
identical = Outcome("bit for bit as without")

fused = partial(Adam, lr=0.01, fused=True)
steady = {"scaler": {"init_scale": 256.0}, "count": 2}
overflow = {
    "scaler": {"init_scale": 2.0**22, "backoff_factor": 2.0**-14},
    "count": 3,
}  # the first step's gradients do
bf16 = {
    "trainer": {"precision": "bf16-mixed"},
    "settings": {"autocast": torch.bfloat16},
    "count": 3,
}
three = {"trainer": {"accumulate_grad_batches": 3}, "settings": {"accumulate": 3}}
by_norm = {"trainer": {"gradient_clip_val": 0.3}, "settings": {"clip": clip_norm}}
by_value = {
    "trainer": {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
    "settings": {"clip": clip_value},
}
barebones = {"barebones": True} | dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
)
schedule = {"callback": {"coefficient": rising}, "strength": rising}
double = {"trainer": {"precision": "64-true"}, "dtype": torch.float64}
in_closure = {"loop": plain.train_with_closure}
plain_gan = {"loop": plain.train_adversarial, "layers": plain.adversarial_layers}
searching = partial(LBFGS, lr=0.1, max_iter=3, line_search_fn="strong_wolfe")
share = Share(0.3)

SITUATIONS = [
    Situation(PRECISION, "fp32"),
    Situation(PRECISION, "Adam", optimizer=partial(Adam, lr=0.01)),
    Situation(PRECISION, "fused Adam", optimizer=fused),
    Situation(PRECISION, "AdamW", optimizer=partial(AdamW, lr=0.01, weight_decay=0.1)),
    Situation(PRECISION, "bf16-mixed", **bf16),
    Situation(PRECISION, "64-true", **double),
    Situation(
        None,
        "half space",
        callback={"measure": plain.HALF_SPACE},
        layers=lambda module: plain.layers(module.net, measure=plain.HALF_SPACE),
    ),
    Situation(SCALER, "scaler", **steady),
    Situation(SCALER, "scaler, fused", **steady, optimizer=fused),
    Situation(SCALER, "scaler, overflow, schedule", **overflow, **schedule),
    Situation(SCALER, "scaler, overflow, schedule, fused", **overflow, **schedule, optimizer=fused),
    Situation(ACCUMULATION, "accumulate 3 of 5", loss=short, **three),
    Situation(
        ACCUMULATION, "scaler, accumulate 3 of 4", loss=short, **three, **steady | {"count": 4}
    ),
    Situation(CLIP, "clip by norm", clipped, clipped, unclipped, **by_norm),
    Situation(CLIP, "clip by value", clipped, clipped, unclipped, **by_value),
    Situation(CLIP, "scaler, clip by norm", clipped, clipped, unclipped, **by_norm, **steady),
    Situation(
        "a `training_step` that returns None",
        "silent",
        module=partial(Automatic, silent=(1, 4)),
        settings={"silent": (1, 4)},
    ),
    Situation(MANUAL, "manual", loss=not_manual, module=Manual),
    Situation(
        MANUAL,
        "three parts",
        loss=not_manual,
        module=partial(Manual, parts=3),
        settings={"parts": 3},
    ),
    Situation(
        MANUAL,
        "manual accumulation",
        loss=not_manual,
        module=partial(Manual, every=2),
        count=6,
        settings={"accumulate": 2},
    ),
    Situation(
        MANUAL, "zero_grad after the step", loss=not_manual, module=partial(Manual, zero_after=True)
    ),
    Situation(MANUAL, "manual, bf16-mixed", loss=not_manual, module=Manual, **bf16),
    Situation(MANUAL, "manual, scaler", loss=not_manual, module=Manual, **steady),
    Situation(
        MANUAL, "manual, scaler, overflow", loss=not_manual, module=Manual, **overflow, **schedule
    ),
    Situation(
        MANUAL,
        "manual, scaler, fused, unscaled by hand",
        loss=not_manual,
        module=models.UnscalesAndClips,
        optimizer=fused,
        settings={"clip_first": clip_norm, "unscales": True},
        **steady,
    ),
    Situation(
        "your own clipping in manual optimisation",
        "manual, clipped",
        exact("added after yours, unclipped"),
        not_manual,
        unclipped,
        module=partial(Manual, clip=0.3),
        settings={"clip_first": clip_norm},
    ),
    Situation(GAN, "GAN", loss=not_manual, module=lambda **_: Adversarial(), **plain_gan),
    Situation(
        GAN,
        "GAN, toggled",
        loss=not_manual,
        module=lambda **_: Adversarial(toggle=True),
        **plain_gan,
    ),
    Situation(
        "`optimizers(use_pl_optimizer=False)`",
        "raw",
        absent,
        not_manual,
        module=partial(Manual, raw=True),
        kept="absent, with a warning",
    ),
    Situation(
        CLOSURE,
        "LBFGS",
        optimizer=partial(LBFGS, lr=0.1, max_iter=4),
        **double,
        **in_closure,
        **schedule,
    ),
    Situation(CLOSURE, "SAM", optimizer=models.SharpnessAware, **in_closure, **schedule),
    Situation(CLOSURE, "no recording", optimizer=models.WithoutRecording, **in_closure),
    Situation(
        "LBFGS with a line search",
        "search",
        searched,
        searched,
        optimizer=searching,
        **double,
        **in_closure,
        count=2,
    ),
    Situation(
        None,
        "a step that calls its parent's",
        optimizer=partial(models.StepsThroughItsParent, lr=0.1),
        **schedule,
    ),
    Situation(
        None, "a learning rate schedule", module=models.Scheduled, loop=plain.train_scheduled
    ),
    Situation(GROUPS, "two groups", optimizer=in_two_groups),
    Situation(
        GROUPS,
        "neurons that are copies",
        module=with_net(models.image_network),
        layers=plain.image_layers,
        optimizer=biases_faster,
    ),
    Situation(FROZEN, "frozen", module=with_net(models.partly_frozen_network)),
    Situation(
        FROZEN,
        "BaseFinetuning",
        optimizer=thawed,
        beside=lambda: [models.UnfreezeLater()],
        loop=partial(plain.train_unfreezing, part=1, rate=0.1),
    ),
    Situation(
        FROZEN,
        "BackboneFinetuning",
        module=models.WithBackbone,
        optimizer=thawed,
        beside=lambda: [callbacks.BackboneFinetuning(1, backbone_initial_lr=0.05)],
        loop=partial(plain.train_unfreezing, part=3, rate=0.05),
    ),
    Situation(
        "a layer that the loss does not reach",
        "detour",
        alone,
        exact("the penalty alone moves it"),
        alone,
        module=with_net(lambda: models.Detour(*models.network())),
        kept="left alone, with a warning",
    ),
    Situation(
        COMPUTED,
        "ModelPruning",
        decoupled=computed,
        beside=lambda: [models.PruneTwo()],
        loop=plain.train_pruning,
    ),
    Situation(
        COMPUTED, "weight_norm", decoupled=computed, module=with_net(models.weight_normed_network)
    ),
    Situation(
        WEIGHTS,
        "LSTM, attention",
        module=with_net(models.SequenceNetwork),
        layers=plain.sequence_layers,
        **double,  # gates of four neurons: in float32 a last bit grows to 2e-6
    ),
    Situation(
        WEIGHTS,
        "channels_last, transposed",
        module=with_net(models.image_network),
        layers=plain.image_layers,
    ),
    Situation(
        AVERAGE,
        "StochasticWeightAveraging",
        beside=lambda: [
            callbacks.StochasticWeightAveraging(0.05, 1, 1, "linear"),
            models.KeepRun(),
        ],
        loop=plain.train_averaging,
    ),
    Situation(
        AVERAGE,
        "EMAWeightAveraging",
        beside=lambda: [callbacks.EMAWeightAveraging(decay=0.9), models.KeepRun()],
        loop=plain.train_averaging_exponentially,
        since="2.6",
    ),
    Situation(COMPILE, "a compiled part", compiled=models.compile_net),
    Situation(COMPILE, "all compiled", compiled=models.compile_all),
    Situation(STRENGTH, "every second step", callback={"every_n_steps": 2}, every=2),
    Situation(STRENGTH, "a schedule", **schedule),
    Situation(
        STRENGTH,
        "LinearSchedule",
        callback={"coefficient": LinearSchedule(0.6, warmup=2, end=6)},
        strength=lambda step, layer: [0.2, 0.4, 0.6, 0.45, 0.3, 0.15, 0.0, 0.0, 0.0, 0.0][step],
    ),
    Situation(
        STRENGTH,
        "CosineSchedule, every second step",
        callback={"coefficient": CosineSchedule(0.5, end=6, final=0.1), "every_n_steps": 2},
        strength=lambda step, layer: 0.1 + 0.2 * (1 + math.cos(math.pi * min(step / 6, 1))),
        every=2,
    ),
    Situation(
        STRENGTH,
        "by layer, a schedule inside, none for the rest",
        callback={"coefficient": {"net.5": rising, "net.[02]": 0.3}},
        strength=by_layer(0.3, net_5=rising, net_7=0.0),
    ),
    Situation(
        STRENGTH,
        "the head apart",
        callback={"head_coefficient": 2.0},
        strength=by_layer(0.5, net_7=2.0),
    ),
    Situation(
        SHARE, "Share", loss=not_share, callback={"coefficient": share}, strength=by_layer(share)
    ),
    Situation(
        SHARE,
        "Share for a layer, clipped, every second step",
        loss=not_share,
        callback={
            "coefficient": {"net.5": Share(0.5, smoothing=0.5), "*": 0.2},
            "every_n_steps": 2,
        },
        strength=by_layer(0.2, net_5=Share(0.5, smoothing=0.5)),
        every=2,
        **by_norm,
    ),
    Situation(
        SHARE,
        "Share, SAM",
        loss=not_share,
        callback={"coefficient": share},
        strength=by_layer(share),
        optimizer=models.SharpnessAware,
        **in_closure,
    ),
    Situation(
        SHARE,
        "Share, overflow, fused",
        loss=not_share,
        callback={"coefficient": share},
        strength=by_layer(share),
        optimizer=partial(
            fused, eps=1e-3
        ),  # else Adam makes of a gradient near zero, and of its rounding error, a full step
        **overflow,
    ),
    Situation(None, "no step limit", callback={"step_limit": None}),
    Situation(
        TRAINER, "fast_dev_run", trainer={"fast_dev_run": True}, count=1, settings={"epochs": 1}
    ),
    Situation(
        TRAINER, "overfit_batches", trainer={"overfit_batches": 2}, loop=plain.train_on_two_batches
    ),
    Situation(TRAINER, "barebones", trainer=barebones),
    Situation(TRAINER, "log_every_n_steps=0", trainer={"log_every_n_steps": 0}),
    Situation(TRAINER, "log_every_n_steps=2", trainer={"log_every_n_steps": 2}),
    Situation(
        INSTANCES,
        "two callbacks",
        callback=(
            {"coefficient": 0.3, "include": ["net.0", "net.2"]},
            {"coefficient": rising, "include": ["net.5", "net.7"], "prefix": "dense"},
        ),
        strength=by_layer(0.3, net_5=rising, net_7=rising),
    ),
    Situation(INSTANCES, "used before", prepare=models.used_before, **schedule),
    Situation(INSTANCES, "copied", prepare=copy.deepcopy, **schedule),
    Situation(
        INSTANCES, "used before, unpickled", prepare=models.used_before_and_unpickled, **schedule
    ),
    Situation(
        INSTANCES, "fit twice", fit=models.fit_twice, optimizer=partial(SGD, lr=0.1), **schedule
    ),
    Situation(INSTANCES, "resumed", fit=models.fit_and_resume, **schedule),
    Situation(
        "`coefficient=0`: only monitoring",
        "monitoring",
        identical,
        identical,
        identical,
        where=("tests/test_exactness.py::test_monitoring_alone_leaves_training_bit_identical",),
        kept="bit for bit as without",
    ),
    Situation(
        "DDP: plain, `static_graph`, bucket views, `find_unused_parameters`, manual",
        "DDP",
        exact("ranks bit-identical"),
        exact("ranks bit-identical"),
        exact("ranks bit-identical"),
        where=(
            "tests/test_distributed.py::test_two_ranks_equal_one_process_with_the_doubled_batch",
            "tests/test_tolerance_ranks.py::test_ranks_compute_the_same_layers_and_train_as_one_process",
        ),
        kept="exact, ranks bit-identical",
    ),
    Situation(
        "DDP with `find_unused_parameters` and a layer that the loss does not use",
        "DDP, unused",
        Outcome("left alone"),
        Outcome("error: use gradient"),
        Outcome("left alone"),
        where=(
            "tests/test_distributed.py::test_two_ranks_equal_one_process_with_the_doubled_batch",
            "tests/test_distributed.py::test_a_layer_that_ddp_has_closed_is_named_on_every_rank",
            "tests/test_distributed.py::test_layers_of_several_loops_are_shared",
        ),
        kept="left alone",
    ),
    Situation(
        "DDP, layers divided over the ranks (`share_work`)",
        "DDP, shared",
        exact("ranks bit-identical"),
        Outcome("not shared"),
        exact("ranks bit-identical"),
        where=(
            "tests/test_distributed.py::test_each_rank_sends_one_message_a_step_however_many_layers_there_are",
            "tests/test_distributed.py::test_layers_of_several_loops_are_shared",
            "tests/test_distributed.py::test_layers_that_fall_due_at_different_steps_are_shared",
        ),
    ),
    Situation(
        "FSDP2, tensor parallel, both (ModelParallelStrategy); uneven and empty shards",
        "sharded",
        where=(
            "tests/test_sharded.py::test_ranks_train_as_one_process_does",
            "tests/test_tolerance_ranks.py::test_ranks_compute_the_same_layers_and_train_as_one_process",
        ),
    ),
    Situation(
        "FSDP1 (FSDPStrategy with `use_orig_params=True`, Lightning's default)",
        "FSDP1",
        loss=Outcome("error: use gradient"),
        where=(
            "tests/test_sharded.py::test_ranks_train_as_one_process_does",
            "tests/test_sharded.py::test_what_flat_pieces_cannot_do_is_refused_on_every_rank",
            "tests/test_tolerance_ranks.py::test_ranks_compute_the_same_layers_and_train_as_one_process",
        ),
    ),
    Situation(
        "FSDP1 with `use_orig_params=False`; DeepSpeed and strategies not named here",
        "refused",
        Outcome("error: use another"),
        Outcome("error: use another"),
        Outcome("error: use another"),
        where=(
            "tests/test_sharded.py::test_what_flat_pieces_cannot_do_is_refused_on_every_rank",
            "tests/test_callback.py::test_a_strategy_that_hides_weights_is_refused_by_name",
        ),
        kept="error: use another",
    ),
]
HERE = [row for row in SITUATIONS if not row.where]


def cases(*, refused):
    """Rows and modes that Lightning has, of those that are refused or of the others."""
    return [
        pytest.param(row, mode, id=f"{row.name}-{mode}")
        for row in HERE
        for mode in MODES
        if Version(lightning.__version__) >= Version(row.since)
        and bool(getattr(row, mode).error) == refused
    ]


@pytest.mark.filterwarnings("ignore:the penalty is too strong")  # of a task close to 0
@pytest.mark.parametrize(("row", "mode"), cases(refused=False))
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit.*")
def test_trains_as_a_plain_loop_does(row, mode):
    outcome = getattr(row, mode)
    module = row.module(make_optimizer=row.optimizer)
    twin, without, before = (copy.deepcopy(module).to(row.dtype) for _ in range(3))
    data = batches(row.count, dtype=row.dtype)
    with warned_of(outcome):
        fit_with_lightning(row, mode, module, data)
    fit_plainly(row, outcome.mode or mode, twin, data)
    fit_plainly(row, "none", without, data)
    assert max_difference(twin, module) < row.tolerance
    assert max_difference(before, twin) > 1e-3
    assert max_difference(without, twin) > 10 * row.tolerance or outcome.mode == "none"


before_steps = ("gradient", "loss")
KEEPING_NOTHING = {
    "LBFGS": before_steps,
    "SAM": before_steps,
    "Share, SAM": before_steps,
    "search": before_steps,
    "raw": before_steps,
    "fast_dev_run": MODES,
}
"""By mode. A closure that runs again moves the weights within a step; the others apply the penalty once or never."""


def keeping(*, nothing):
    """Rows and modes that use no gradient again, or the others."""
    found = []
    for case in cases(refused=False):
        row, mode = case.values
        if (mode in KEEPING_NOTHING.get(row.name, ())) == nothing:
            found.append(case)
    return found


@pytest.mark.filterwarnings("ignore:the penalty is too strong")
@pytest.mark.parametrize(("row", "mode"), keeping(nothing=False))
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit.*")
def test_keeps_gradients_as_a_plain_loop_of_the_same_schedule_does(row, mode):
    module, (twin, fresh), data, schedule = fit_keeping(row, mode)
    assert not all(uses_of(schedule))
    fit_plainly_keeping(row, mode, twin, data, schedule)
    difference = max_difference(twin, module)
    assert difference < row.tolerance
    fit_plainly(row, getattr(row, mode).mode or mode, fresh, data)
    assert max_difference(fresh, module) > 2 * difference


@pytest.mark.filterwarnings("ignore:the penalty is too strong")
@pytest.mark.parametrize(("row", "mode"), keeping(nothing=True))
@pytest.mark.filterwarnings("ignore:.*barebones.*", "ignore:.*overfit.*")
def test_computes_every_gradient_where_none_can_be_used_again(row, mode):
    module, (twin, _), data, schedule = fit_keeping(row, mode)
    assert all(uses_of(schedule))
    fit_plainly_keeping(row, mode, twin, data, schedule)
    assert max_difference(twin, module) < row.tolerance


@pytest.mark.parametrize(("row", "mode"), cases(refused=True))
def test_is_refused_before_anything_has_moved(row, mode):
    outcome = getattr(row, mode)
    module = row.module(make_optimizer=row.optimizer)
    before = copy.deepcopy(module).to(row.dtype)
    data = batches(row.count, dtype=row.dtype)
    with pytest.raises(outcome.error, match=outcome.message):
        fit_with_lightning(row, mode, module, data)
    assert max_difference(module, before) == 0


def warned_of(outcome):
    return pytest.warns(UserWarning, match=outcome.message) if outcome.message else nullcontext()


def our_callbacks(row, mode, **more):
    given = row.callback if isinstance(row.callback, tuple) else (row.callback,)
    return [
        row.prepare(uniformity(**{"coefficient": 0.5, "apply": mode, **settings, **more}))
        for settings in given
    ]


def fit_with_lightning(row, mode, module, data, ours=None):
    ours = our_callbacks(row, mode) if ours is None else ours
    settings = dict(row.trainer)
    if row.scaler:
        settings["plugins"] = [
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **row.scaler))
        ]
    row.fit(trainer(*row.beside(), *ours, **settings), row.compiled(module), data)


def fit_keeping(row, mode):
    """Fit with a generous tolerance, so that some gradients are used again in so few steps.

    Returns:
        The module, two copies of it from before, the data, and the schedule of its gradients.
    """
    module = row.module(make_optimizer=row.optimizer)
    copies = [copy.deepcopy(module).to(row.dtype) for _ in range(2)]
    data = batches(row.count, dtype=row.dtype)
    ours = our_callbacks(row, mode, tolerance=0.9)
    with warned_of(getattr(row, mode)), plain.recorded_schedule() as schedule:
        fit_with_lightning(row, mode, module, data, ours)
    return module, copies, data, schedule


def uses_of(schedule):
    """Whether each use of a gradient computed it."""
    return [use.is_computed for uses in schedule.values() for use in uses]


def fit_plainly_keeping(row, mode, module, data, schedule, **limits):
    kept = plain.Kept(schedule)
    penalty = fit_plainly(row, getattr(row, mode).mode or mode, module, data, kept, **limits)
    assert kept.is_used_up()
    return penalty


def fit_plainly(row, mode, module, data, kept=None, **limits):
    """Train in a plain loop; returns its penalty, whose limits are the row's or those given."""
    given = row.callback if isinstance(row.callback, dict) else {}
    for name in ("step_limit", "share_limit"):
        if name in given:
            limits.setdefault(name, given[name])
    accumulate = row.settings.get("accumulate", 1)
    layers = row.layers(module)
    penalty = plain.Penalty(layers, mode, row.strength, row.every, accumulate, kept, **limits)
    settings = dict(row.settings)
    if row.scaler:
        settings |= {"autocast": torch.float16, "scaler": torch.amp.GradScaler("cpu", **row.scaler)}
    row.loop(module, data, penalty, **settings)
    return penalty


def max_difference(a, b):
    """Over the parameters of a, under the names that pruning and compiling leave them."""
    mine, others = named(a), named(b)
    return max(float((p - others[name]).detach().abs().max()) for name, p in mine.items())


def named(module):
    return {
        name.replace("_orig_mod.", "").replace("weight_orig", "weight"): p
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_monitoring_alone_leaves_training_bit_identical(mode, tolerance):
    data, module = batches(), Automatic()
    twin = copy.deepcopy(module)
    ours = uniformity(coefficient=0, apply=mode, tolerance=tolerance)
    for one, chain in ((module, [ours]), (twin, [])):
        torch.manual_seed(3)
        trainer(*chain, log_every_n_steps=1).fit(one, loader(data))
        one.after = torch.rand(1)  # and the random stream
    assert torch.equal(module.after, twin.after)
    assert all(
        torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.parametrize("row", [row for row in SITUATIONS if row.where], ids=lambda row: row.name)
def test_what_another_test_holds_is_there(row):
    for file, _, name in (test.partition("::") for test in row.where):
        tree = ast.parse((Path(__file__).parents[1] / file).read_text())
        assert name in [part.name for part in tree.body if isinstance(part, ast.FunctionDef)]


def test_the_readme_has_this_table():
    """After a change: python -m tests.compatibility --write."""
    assert split_readme() is not None, "README.md lacks the marks of the table"
    assert split_readme()[1] == table(SITUATIONS)
