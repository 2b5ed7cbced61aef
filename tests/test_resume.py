"""An interrupted and resumed run is the uninterrupted one, bit for bit, wherever Lightning itself resumes so.

Where that is, the same run without the callback tells: after any batch, if the loader says where it stands. It is not with a
loader that begins its epoch again or shuffles by the global generator, which Lightning does not save, nor in the midst of an
accumulation, whose gradients it does not save.
"""

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader

from lightning_hsu import HypersphericalUniformity, LinearSchedule, Share
from lightning_hsu.measures import Covering, Polarization, RieszEnergy, SlicedWasserstein
from lightning_hsu.projections import Projected, RandomProjection
from tests import plain
from tests.models import (
    Adversarial,
    Automatic,
    Manual,
    Scheduled,
    batches,
    loader,
    trainer,
    uniformity,
)
from tests.processes import forkserver, world
from tests.test_memory import CARRYING

pytestmark = pytest.mark.usefixtures("_few_random_layers")

MODES = ("gradient", "loss", "decoupled")
DATA, LAST = batches(count=5), 10  # two epochs
EVERY = tuple(range(1, LAST + 1))
# Before, Lightning counts batches wrongly in a resumed epoch, and begins the loader again at its end.
COUNTS_RIGHT = Version(pl.__version__) >= Version("2.6")
DRAWN = Projected(
    RieszEnergy(s=1), RandomProjection(dim=4)
)  # another draw each step: whoever counts wrongly is found out
LEARNED = CARRYING[5]


class Resumable:
    """A loader that says where it stands: after the batch that it gave last or, ``again``, before it."""

    def __init__(self, data=DATA, again=False):
        self.data = data
        self.again = again
        self.place = 0
        self.start = 0

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        start, self.start = self.start % len(self.data), 0
        for i in range(start, len(self.data)):
            self.place = i if self.again else i + 1
            yield self.data[i]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]


IN_ORDER = partial(loader, DATA)
AGAIN = partial(Resumable, again=True)
EVERY_OTHER = partial(Manual, every=2)


class In(pl.Callback):
    """Call a function in one of the hooks, at every batch or at one."""

    def __init__(self, hook, call, batch=None):
        self.call, self.batch = call, batch
        setattr(self, hook, self.turn)

    def turn(self, trainer, pl_module, *_):
        if self.batch in (None, batches_begun(trainer)):
            self.call(trainer, pl_module)


def saving(folder, hook="on_train_batch_end"):
    return In(hook, partial(save, folder))


def save(folder, trainer, _):
    trainer.save_checkpoint(folder / f"{batches_begun(trainer)}.ckpt")


def batches_begun(trainer):
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def leaves(tree, path=()):
    """Tensors and plain values of nested mappings and sequences, by path."""
    if isinstance(tree, Mapping | list | tuple):
        parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        return {
            place: leaf for key, part in parts for place, leaf in leaves(part, (*path, key)).items()
        }
    return {path: tree}


def bits(leaf):
    return (
        (leaf.dtype, leaf.shape, leaf.detach().numpy().tobytes())
        if isinstance(leaf, torch.Tensor)
        else leaf
    )


def differing(one, other):
    """Paths at which two trees are not bit for bit the same."""
    one, other = leaves(one), leaves(other)
    return [
        path
        for path in one | other
        if path not in one or path not in other or bits(one[path]) != bits(other[path])
    ]


def fitted(callbacks=(), make=Automatic, data=Resumable, ckpt=None, **settings):
    """What a fit ends with: the weights, what our callbacks carry, what they logged."""
    torch.manual_seed(3 if ckpt is None else 4)  # a resumed run begins with weights of its own
    module, fit = make(), trainer(*callbacks, **settings)
    fit.fit(module, data(), ckpt_path=ckpt)
    carried = [
        callback.state_dict()
        for callback in callbacks
        if isinstance(callback, HypersphericalUniformity)
    ]
    # neurons are not counted as limited on a step that leaves the penalty out
    logged = {
        name: value
        for name, value in fit.callback_metrics.items()
        if COUNTS_RIGHT and "limited" not in name
    }
    return {
        "weights": [p.detach().clone() for p in module.parameters()],
        "carried": carried,
        "logged": logged,
    }


def made(ours):
    return [uniformity(**settings) for settings in ours]


def interrupted(folder, ours, steps, hook="on_train_batch_end", plugins=list, **run):
    """By step, what differs between the run that is resumed from there and the uninterrupted one."""
    # the worse place: before our turn at the end of a batch, after it within a step
    callbacks = [saving(folder, hook), *made(ours)][:: 1 if hook == "on_train_batch_end" else -1]
    whole, found = fitted(callbacks, plugins=plugins(), **run), {}
    for k in steps:
        if (saved := folder / f"{k}.ckpt").exists():
            paths = differing(fitted(made(ours), ckpt=saved, plugins=plugins(), **run), whole)
            found[k] = [path for path in paths if k < LAST or path[0] != "logged"]
    return found


@cache
def lightning_resumes_from(steps, **run):
    """Those of the steps from which it does so bit for bit."""
    with TemporaryDirectory() as folder:
        found = interrupted(Path(folder), [], steps, **run)
    return [k for k, paths in found.items() if not paths]


def resumable(*steps, **run):
    """All of these steps, from which Lightning resumes bit for bit: before 2.6 those of them from which it does."""
    found = lightning_resumes_from(steps, **run)
    assert found == [*steps] or not COUNTS_RIGHT
    return found


class Uneven(Adversarial):
    """The second optimizer steps on every other batch, and then before the first."""

    def training_step(self, batch, batch_idx):
        for i in (1, 0) if batch_idx % 2 == 0 else (0,):
            self.zero_grad()
            self.manual_backward(self.losses(batch)[i])
            self.optimizers()[i].step()


def adam():
    return Automatic(make_optimizer=lambda p: torch.optim.Adam(p, lr=0.01))


def crowded():
    """So many neurons in few dimensions that none of the searches has an exact way, which would need no state."""
    return Automatic(
        net=nn.Sequential(
            nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 24), nn.Tanh(), nn.Linear(24, 3)
        )
    )


def scaling():
    """Gradients overflow on the first steps, which are left out."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18))]


def everything():
    """Settings of three callbacks with a mode each."""
    return [
        {"measure": DRAWN, "coefficient": Share(0.3), "include": "net.5", "head": None},
        {
            "measure": Polarization(),
            "include": "net.2",
            "head": None,
            "prefix": "loss",
            "apply": "loss",
        },
        {
            "measure": LEARNED,
            "include": ["net.0", "net.7"],
            "prefix": "decoupled",
            "apply": "decoupled",
        },
    ]


def cases():
    """Settings of the callbacks and of the run."""
    yield pytest.param(everything(), {"make": adam}, id="three callbacks")
    for mode in MODES:
        scheduled = {
            "coefficient": LinearSchedule(1.0, 3, 9),
            "head_coefficient": lambda step: 1 / (1 + step),
        }
        scheduled |= {"measure": DRAWN, "apply": mode, "every_n_steps": 2}
        yield pytest.param(
            [scheduled], {"make": Scheduled}, id=f"{mode}, schedules, every second step"
        )
        yield pytest.param(
            [{"measure": LEARNED, "apply": mode}], {"make": adam}, id=f"{mode}, Adam"
        )
        if mode != "loss":  # which knows neither manual optimisation nor shares
            by_layer = {
                "net.0": Share(0.1, smoothing=0.5),
                "net.5": LinearSchedule(0.5, 2, 8),
                "*": Share(0.2),
            }
            shares = {"measure": DRAWN, "coefficient": by_layer, "apply": mode}
            yield pytest.param([shares], {}, id=f"{mode}, shares")
            yield pytest.param(
                [shares], {"make": adam, "plugins": scaling}, id=f"{mode}, shares, scaled"
            )
            yield pytest.param(
                [shares | {"every_n_steps": 2}], {"make": Manual}, id=f"{mode}, shares, manual"
            )
            counted = scheduled | {"head_coefficient": 0.5}  # the head is the second optimizer's
            yield pytest.param([counted], {"make": Uneven}, id=f"{mode}, two optimizers")


def held(path):
    """Shapes of the tensors and types of the plain numbers that a checkpoint holds of callbacks."""
    leaf_at = leaves(torch.load(path, weights_only=True)["callbacks"])
    tensors = {path: leaf for path, leaf in leaf_at.items() if isinstance(leaf, torch.Tensor)}
    assert {type(leaf) for path, leaf in leaf_at.items() if path not in tensors} <= {
        int,
        float,
        bool,
        str,  # names of heads
    }
    assert not any(leaf.requires_grad for leaf in tensors.values())
    assert all(
        leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in tensors.values()
    )  # a view would keep all it views
    return {path: leaf.shape if path in tensors else type(leaf) for path, leaf in leaf_at.items()}


@pytest.mark.parametrize(("ours", "run"), list(cases()))
def test_interrupted_after_a_batch(ours, run, tmp_path):
    check_resumed(tmp_path, ours, resumable(1, 4, 5, 9, **run), run)


@pytest.mark.parametrize("measure", CARRYING, ids=repr)
def test_what_a_measure_carries_is_resumed(measure, tmp_path):
    """Within an epoch and at its end."""
    ours = [{"measure": measure, "include": "net.3", "head": None}]
    run = {"make": crowded}
    check_resumed(tmp_path, ours, resumable(4, 5, **run), run)


def check_resumed(folder, ours, steps, run):
    assert interrupted(folder, ours, steps, **run) == {k: [] for k in steps}
    first, *later = (held(folder / f"{k}.ckpt") for k in range(4, LAST + 1))
    assert first
    assert all(one == first for one in later)  # no checkpoint grows


def shuffled():
    return DataLoader(loader(DATA).dataset, batch_size=4, shuffle=True)


def runs():
    """Ways to run, with the steps after which Lightning itself goes on as if nothing had happened."""
    for mode in MODES:
        yield {}, EVERY, mode
        yield {"data": IN_ORDER}, [5, 10], mode
        yield {"data": IN_ORDER, "hook": "on_train_epoch_end"}, [5, 10], mode
        yield {"data": shuffled}, [], mode
        yield {"accumulate_grad_batches": 3}, [3, 5, 8, 10], mode
        if mode != "loss":  # which manual optimisation refuses
            yield {"make": EVERY_OTHER}, [2, 4, 5, 7, 9, 10], mode


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable.*")
@pytest.mark.parametrize(("run", "lightning", "mode"), list(runs()))
def test_interrupted_wherever_lightning_resumes(run, lightning, mode, tmp_path):
    steps = lightning_resumes_from(EVERY, **run)
    assert {*steps} >= {*lightning} or not COUNTS_RIGHT
    assert interrupted(tmp_path, [{"measure": DRAWN, "apply": mode}], steps, **run) == {
        k: [] for k in steps
    }


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("mode", MODES)
def test_interrupted_within_a_step_which_is_done_again(mode, hook, tmp_path):
    """As a signal's handler saves: the counts and states must be those of the last complete step."""
    run = {"data": AGAIN, "hook": hook}
    steps = resumable(1, 4, 6, **run)
    ours = [
        {
            "measure": DRAWN,
            "apply": mode,
            "coefficient": LinearSchedule(1.0, 3, 9),
            "every_n_steps": 2,
        }
    ]
    assert interrupted(tmp_path, ours, steps, **run) == {k: [] for k in steps}


WITHIN = (1, 4, 7)


def lose(_, pl_module):
    pl_module.zero_grad()  # as an interruption loses the gradients accumulated so far


def loses_no_more(folder, ours):
    """The steps within an accumulation where an interruption loses its gradients, and nothing else."""
    accumulating = {"accumulate_grad_batches": 3}
    fitted([saving(folder), *made(ours)], **accumulating)
    forgetful = {
        k: fitted([*made(ours), In("on_train_batch_end", lose, k)], **accumulating) for k in WITHIN
    }
    resumed = {k: fitted(made(ours), ckpt=folder / f"{k}.ckpt", **accumulating) for k in WITHIN}
    return [k for k in WITHIN if not differing(resumed[k], forgetful[k])]


def test_lightning_loses_the_gradients_of_an_accumulation_and_no_more(tmp_path):
    assert loses_no_more(tmp_path, []) == ([*WITHIN] if COUNTS_RIGHT else [])


@pytest.mark.parametrize(
    ("mode", "coefficient"),
    [
        *((mode, LinearSchedule(1.0, 1, 4)) for mode in MODES),
        *((mode, Share(0.3)) for mode in MODES if mode != "loss"),  # which has no shares
    ],
)
def test_an_interruption_within_an_accumulation_loses_no_more_than_lightning(
    mode, coefficient, tmp_path
):
    ours = [{"measure": DRAWN, "apply": mode, "coefficient": coefficient}]
    assert loses_no_more(tmp_path, ours) == [*WITHIN] or not COUNTS_RIGHT
    states = {k: saved_state(tmp_path / f"{k}.ckpt") for k in EVERY}
    assert [sum(state["steps"]) for state in states.values()] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert "states" not in states[1]
    assert not any(
        differing(states[k], states[complete]) for k, complete in {4: 3, 6: 5, 7: 5, 9: 8}.items()
    )


def saved_state(path):
    """What the one callback of a run left in a checkpoint."""
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    return state


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fitted([*made(everything()), In("on_train_batch_end", die, 5), keep], enable_checkpointing=True)


def killed(train, folder):
    """Train in a process of its own, which has to end by SIGKILL."""
    child = forkserver().Process(target=train, args=(folder,))
    child.start()
    child.join(timeout=300)
    exitcode = child.exitcode
    child.kill()
    assert exitcode == -signal.SIGKILL


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*ModelCheckpoint.*")
def test_killed_between_checkpoints(tmp_path):
    killed(train_and_die, tmp_path)
    assert names_in(tmp_path) == {"step=2.ckpt", "step=4.ckpt"}
    assert not differing(
        fitted(made(everything()), ckpt=tmp_path / "step=4.ckpt"), fitted(made(everything()))
    )


KEPT = {"tolerance": 0.05, "coefficient": 0.5}
SLOW = {"make": partial(Automatic, lambda p: torch.optim.SGD(p, lr=5e-4, momentum=0.9))}
SLOW |= {"max_epochs": 5}


def checkpoints_of(folder):
    """Every sixth step; after each, all kept gradients are computed anew."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)


class Computed(pl.Callback):
    """Notes of which layers each step computed the gradients."""

    def __init__(self, ours):
        self.ours = ours
        self.layers = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.layers[trainer.global_step] = set(self.ours.regularizer.state.deltas.computed)


def fitted_with_kept_gradients(folder, *callbacks, ckpt=None):
    """What a fit that writes checkpoints ends with, and what its steps computed."""
    ours = uniformity(**KEPT)
    computed = Computed(ours)
    all_of_them = [ours, *callbacks, computed, checkpoints_of(folder)]
    end = fitted(all_of_them, ckpt=ckpt, enable_checkpointing=True, **SLOW)
    return end, computed.layers


def train_with_kept_gradients_and_die(folder):
    fitted_with_kept_gradients(folder, In("on_train_batch_end", die, 16))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_killed_between_checkpoints_with_a_tolerance(tmp_path):
    """The uninterrupted training writes the same checkpoints, since a kept gradient ends with each."""
    killed(train_with_kept_gradients_and_die, tmp_path / "killed")
    assert names_in(tmp_path / "killed") == {"step=6.ckpt", "step=12.ckpt"}
    whole, computed = fitted_with_kept_gradients(tmp_path / "whole")
    resumed, computed_then = fitted_with_kept_gradients(
        tmp_path / "killed", ckpt=tmp_path / "killed/step=12.ckpt"
    )
    assert not differing(resumed, whole)
    assert computed_then == {step: layers for step, layers in computed.items() if step > 12}
    assert len(computed_then[13]) == 4
    assert sum(map(len, computed_then.values())) < 3 * len(computed_then)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"coefficient": 0.3}),
        ({}, {"coefficient": LinearSchedule(0.5, 2)}),
        ({}, {"coefficient": Share(0.1)}),
        ({"coefficient": LinearSchedule(0.5, 2)}, {"coefficient": Share(0.1)}),
        ({"coefficient": Share(0.05)}, {"coefficient": Share(0.1)}),
        (
            {"coefficient": Share(0.05), "apply": "decoupled"},
            {"coefficient": Share(0.1), "apply": "decoupled"},
        ),
        ({"coefficient": Share(0.05)}, {"coefficient": Share(0.05), "apply": "decoupled"}),
        ({"coefficient": Share(0.05)}, {"coefficient": 0.3, "apply": "loss"}),
        *(({"apply": one}, {"apply": other}) for one in MODES for other in MODES if one != other),
    ],
)
def test_changed_settings_keep_the_state(before, after, tmp_path):
    whole = fitted([saving(tmp_path), uniformity(measure=DRAWN, **before)])
    saved = saved_state(tmp_path / "4.ckpt")
    callback = uniformity(measure=DRAWN, **after)
    seen = []
    resumed = fitted(
        [callback, In("on_train_start", lambda *_: seen.append(callback.state_dict()))],
        ckpt=tmp_path / "4.ckpt",
    )
    kept = saved.keys() if isinstance(after.get("coefficient"), Share) else {"steps", "states"}
    assert not differing(
        {name: seen[0][name] for name in kept}, {name: saved[name] for name in kept}
    )
    (end,) = resumed["carried"]
    assert end["steps"] == [LAST]
    assert {int(draw) for state in end["states"].values() for draw in state["draw"]} == {LAST - 1}
    assert differing(resumed["weights"], whole["weights"]) or "decoupled" not in (
        before.get("apply"),
        after.get("apply"),
    )


@pytest.mark.parametrize("coefficient", [1.0, Share(0.3)])
@pytest.mark.parametrize("measure", [Covering(), LEARNED, RieszEnergy()], ids=repr)
def test_a_changed_measure_begins_with_a_fresh_state(measure, coefficient, tmp_path):
    fitted([saving(tmp_path), uniformity(measure=DRAWN, coefficient=coefficient)])
    checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    del state["states"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    other = [{"measure": measure, "coefficient": coefficient}]
    told = nullcontext()
    if measure.has_state:
        told = pytest.warns(UserWarning, match="stored state .* begins anew")
    with told:
        changed = fitted(made(other), ckpt=tmp_path / "4.ckpt")
    fresh = fitted(made(other), ckpt=tmp_path / "without.ckpt")
    assert not differing(changed["weights"], fresh["weights"])
    assert changed["carried"][0]["steps"] == [LAST]


def test_a_checkpoint_without_the_callback_is_a_beginning(tmp_path):
    fitted([saving(tmp_path)])
    used = set()
    callback = uniformity(measure=DRAWN, coefficient=lambda step: used.add(step) or 0.1)
    with pytest.warns(UserWarning, match="has no state under .* anew at global step 4: the sched"):
        (state,) = fitted([callback], ckpt=tmp_path / "4.ckpt")["carried"]
    assert used == set(range(6))
    assert state["steps"] == [6]
    assert {int(draw) for one in state["states"].values() for draw in one["draw"]} == {5}


def test_a_checkpoint_with_the_callback_serves_without_it(tmp_path):
    """Lightning says what is missing, and nothing else happens."""
    fitted([saving(tmp_path), uniformity(measure=DRAWN)])
    torch.save(
        torch.load(tmp_path / "4.ckpt", weights_only=True) | {"callbacks": {}},
        tmp_path / "bare.ckpt",
    )
    with pytest.warns(
        UserWarning, match="callbacks used to create the checkpoint .*HypersphericalUniformity"
    ):
        without = fitted(ckpt=tmp_path / "4.ckpt")
    assert not differing(without, fitted(ckpt=tmp_path / "bare.ckpt"))


def fail(*_):
    raise RuntimeError("broken off")


@pytest.mark.parametrize(
    "hook", ["on_before_backward", "on_before_optimizer_step", "on_train_batch_end"]
)
@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_same_callback_goes_on_after_an_exception(mode, hook, tmp_path):
    """In the second epoch's first batch, which is done again, or at its end; without the callback first."""
    settings = {"measure": DRAWN, "coefficient": LinearSchedule(1.0, 3, 9), "apply": mode}
    ours = [uniformity(**settings)] if mode else []
    data = Resumable if hook == "on_train_batch_end" else IN_ORDER
    with pytest.raises(RuntimeError, match="broken off"):
        fitted([*ours, In(hook, fail, 6), saving(tmp_path, "on_exception")], data=data)
    resumed = fitted(ours, data=data, ckpt=tmp_path / "6.ckpt")
    assert not differing(resumed, fitted([uniformity(**settings)] if mode else []))


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_optimizer_step"])
@pytest.mark.parametrize("mode", MODES)
def test_the_same_trainer_goes_on_after_an_exception(mode, hook):
    """A cell of a notebook that is run again: the step that was broken off is done again, and counts once."""
    callback = uniformity(
        measure=DRAWN, coefficient=lambda step: seen.append(step) or 0.1, apply=mode
    )
    seen = []
    module, fit = Automatic(), trainer(callback)
    failing = In(hook, fail, 3)
    fit.callbacks.append(failing)
    with pytest.raises(RuntimeError, match="broken off"):
        fit.fit(module, loader(DATA))
    fit.callbacks.remove(failing)
    seen.clear()
    fit.fit(module, loader(DATA))
    steps = fit.global_step
    assert callback.state_dict()["steps"] == [steps]
    assert min(seen) == 2
    assert {
        int(draw) for state in callback.state_dict()["states"].values() for draw in state["draw"]
    } == {steps - 1}


class Parts(pl.LightningDataModule):
    """Each rank gets its part of every batch, in order."""

    def train_dataloader(self):
        rank, size = self.trainer.global_rank, self.trainer.world_size
        return Resumable([(x[rank::size], y[rank::size]) for x, y in DATA])


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def in_parallel(ranks):
    """Settings of a Trainer."""
    if ranks == 1:
        return {}
    strategy = DDPStrategy(process_group_backend="gloo")
    return {"devices": ranks, "strategy": strategy, "use_distributed_sampler": False}


def fit_on(ranks, folder, ckpt=None):
    """Train to the end and leave a checkpoint of each batch."""
    ours = [
        {"coefficient": 0.5, "include": "net.0", "head": None},
        {
            "measure": DRAWN,
            "coefficient": Share(0.3),
            "include": "net.5",
            "head": None,
            "prefix": "share",
        },
        {
            "measure": CARRYING[4],
            "coefficient": 0.1,
            "include": "net.2",
            "head": None,
            "prefix": "moved",
            "apply": "decoupled",
        },
        {
            "measure": SlicedWasserstein(),
            "include": "net.7",
            "head": None,
            "prefix": "loss",
            "apply": "loss",
        },
    ]
    torch.manual_seed(3 if ckpt is None else 4)
    trainer(saving(folder), *made(ours), **in_parallel(ranks)).fit(
        Automatic(make_optimizer=plain_sgd), datamodule=Parts(), ckpt_path=ckpt
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_resumed_on_another_number_of_processes(tmp_path):
    fit_on(1, tmp_path / "one")
    world(2).run(fit_on, 2, tmp_path / "two")
    fit_on(1, tmp_path / "to one", tmp_path / "two/3.ckpt")
    world(2).run(fit_on, 2, tmp_path / "to two", tmp_path / "one/3.ckpt")
    whole = torch.load(tmp_path / f"one/{LAST}.ckpt", weights_only=True)
    for folder in ("to one", "to two"):
        resumed = torch.load(tmp_path / folder / f"{LAST}.ckpt", weights_only=True)
        for part in ("state_dict", "callbacks"):
            found, expected = leaves(resumed[part]), leaves(whole[part])
            assert found.keys() == expected.keys()
            for path, value in expected.items():
                if isinstance(value, str):
                    assert found[path] == value
                    continue
                torch.testing.assert_close(
                    found[path],
                    value,
                    rtol=0,
                    atol=1e-6,
                    msg=lambda text, path=path: f"{path}: {text}",
                )


def fit_with_kept_gradients(ranks, epochs, path, ckpt=None):
    """Train up to an epoch, from a checkpoint or from the beginning, and leave a checkpoint.

    Returns:
        How long gradients may be used at the start, their schedule, and the weights at the end.
    """
    ours = uniformity(**KEPT)
    known = []
    at_start = In("on_train_start", lambda *_: known.append(ours.state_dict().get("reuse")))
    torch.manual_seed(3 if ckpt is None else 4)
    module = SLOW["make"]().double()  # Lightning converts it after it has loaded the weights
    settings = {"max_epochs": epochs, "precision": "64-true"} | in_parallel(ranks)
    fit = trainer(ours, at_start, **settings)
    with plain.recorded_schedule() as schedule:
        fit.fit(module, datamodule=Parts(), ckpt_path=ckpt)
    fit.save_checkpoint(path)
    return known[0], schedule, [p.detach() for p in module.parameters()]


def plainly_from(checkpoint, schedule, epochs):
    """The weights of a plain loop that goes on from a checkpoint, with a schedule of gradients."""
    twin = SLOW["make"]().double()
    twin.load_state_dict(checkpoint["state_dict"])
    optimizer = twin.configure_optimizers()
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    twin.configure_optimizers = lambda: optimizer
    kept = plain.Kept(schedule)
    layers = plain.layers(twin.net)
    penalty = plain.Penalty(layers, "gradient", lambda *_: KEPT["coefficient"], kept=kept)
    plain.train(twin, batches(count=5, dtype=torch.float64), penalty, epochs)
    assert kept.is_used_up()
    return [p.detach() for p in twin.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_kept_gradients_go_on_with_another_number_of_processes(before, after, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    run(before, fit_with_kept_gradients, before, 3, first)
    known, schedule, weights = run(after, fit_with_kept_gradients, after, 5, second, first)[0]
    checkpoint = torch.load(first, weights_only=True)
    (ours,) = (one for one in checkpoint["callbacks"].values() if "reuse" in one)
    assert known == ours["reuse"]
    assert max(layer["interval"] for layer in known.values()) > 1
    for uses in schedule.values():
        assert uses[0].is_computed
        assert not uses[0].is_again
        assert not all(use.is_computed for use in uses)
    for p, expected in zip(weights, plainly_from(checkpoint, schedule, 2), strict=True):
        torch.testing.assert_close(p, expected, rtol=0.0, atol=1e-12)


def run(ranks, function, *args):
    """What it gives on each of so many processes."""
    return [function(*args)] if ranks == 1 else world(ranks).run(function, *args)
