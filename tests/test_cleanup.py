"""However a fit ends, nothing of the callback is left on the model, its parameters or the optimizers."""

import pickle
import signal
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_hsu import Share
from lightning_hsu.measures import Covering
from tests.models import Automatic, batches, loader, trainer, uniformity

MODES = ["gradient", "loss", "decoupled"]


class StopError(Exception):
    """Raised by the tests."""


class FailingStep(Automatic):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise StopError
        return super().training_step(batch, batch_idx)


class Interrupted(Automatic):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


class FailingOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 3:
            raise StopError


class FailingLogger(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if step and step >= 3:
            raise StopError


class FailingCallback(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 3:
            raise StopError


class Validated(Automatic):
    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step:
            raise StopError


class Logged(Automatic):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def failing_optimizer():
    return Automatic(make_optimizer=lambda p: FailingOptimizer(p, lr=0.1))


ENDS = {
    "the fit ends": (Automatic, {}),
    "training_step raises": (FailingStep, {}),
    "KeyboardInterrupt": (Interrupted, {}),
    "the optimizer's step raises": (failing_optimizer, {}),
    "the logger raises": (Logged, {"logger": True}),
    "a callback before us raises": (Automatic, {"before": FailingCallback}),
    "a callback after us raises": (Automatic, {"after": FailingCallback}),
    "validation raises": (Validated, {"validate": True}),
}


def traces(module, optimizers):
    """All that a hook, a handle or a patch of ours could be: names of attributes and of hooks."""
    found = {}
    for name, one in [*module.named_modules(), *module.named_parameters()]:
        hooks = {key: len(value) for key, value in vars(one).items() if "hooks" in key and value}
        names = sorted(key for key in vars(one) if "trainer" not in key and "fabric" not in key)
        found[name, type(one).__name__] = names, hooks
        if isinstance(one, nn.Parameter):
            found[name, "backward hooks"] = one._backward_hooks
    for i, one in enumerate(optimizers):
        found[i, "optimizer"] = {
            key: len(value) for key, value in vars(one).items() if key.endswith("_hooks") and value
        }
        found[i, "patches"] = sorted(key for key in vars(one) if key in ("step", "zero_grad"))
    return found


@pytest.mark.parametrize("apply", MODES)
@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(apply, end, tmp_path):
    make, settings = ENDS[end]
    kept = []
    for callbacks in ([], [uniformity(measure=Covering(), coefficient=0.1, apply=apply)]):
        torch.manual_seed(0)
        module = make()
        optimizers = []
        data = loader(batches())
        module.configure_optimizers = partial(configured, module, optimizers)
        before, after = (
            [settings[key]()] if key in settings else [] for key in ("before", "after")
        )
        logger = FailingLogger(tmp_path) if "logger" in settings else False
        fit = trainer(*before, *callbacks, *after, logger=logger, log_every_n_steps=1, max_epochs=1)
        error = ended(
            lambda fit=fit, module=module, data=data: fit.fit(
                module, data, data if "validate" in settings else None
            )
        )
        assert (error is None) == (end == "the fit ends")
        kept.append(traces(module, optimizers))
        for callback in callbacks:
            assert callback.regularizer.layers == [] == callback._fit.hooks
            pickle.dumps(callback)
    assert kept[0] == kept[1]


def configured(module, optimizers):
    optimizers.append(module.make_optimizer(module.parameters()))
    return optimizers[0]


def ended(fit):
    """What a fit ended with; None if all was well."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        fit()
    except (StopError, KeyboardInterrupt, SystemExit) as error:
        return error
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it after an interrupt
    return None


@pytest.mark.parametrize("apply", MODES)
def test_a_callback_goes_on_after_an_exception(apply):
    callback, data = uniformity(coefficient=0.1, apply=apply), loader(batches())
    with pytest.raises(StopError):
        trainer(callback).fit(FailingStep(), data)
    module, twin = Automatic(), Automatic()
    twin.load_state_dict(module.state_dict())
    trainer(callback).fit(module, data)
    trainer(uniformity(coefficient=0.1, apply=apply)).fit(twin, data)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


class FailingEnd(pl.Callback):
    def on_exception(self, trainer, pl_module, exception):
        raise StopError


@pytest.mark.parametrize("apply", MODES)
def test_a_callback_that_was_not_told_of_the_end_begins_anew(apply):
    """Another callback fails in its own on_exception, and Lightning calls no further."""
    callback = uniformity(coefficient=0.1, apply=apply)
    data = loader(batches())
    ends = []
    with pytest.raises(StopError):
        trainer(FailingEnd(), callback).fit(FailingStep(), data)
    for ours in (callback, uniformity(coefficient=0.1, apply=apply)):
        torch.manual_seed(0)
        module = Automatic()
        trainer(ours).fit(module, data)
        ends.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "kwargs", [{"apply": "decoupled"}, {"coefficient": Share(0.05)}, {"apply": "loss"}], ids=str
)
def test_a_callback_can_be_pickled_in_the_middle_of_a_fit(kwargs):
    callback, copies = uniformity(**kwargs), []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            copies.append(pickle.loads(pickle.dumps(callback)))

    trainer(callback, Copy(), max_epochs=1).fit(Automatic(), loader(batches()))
    assert copies[3].regularizer.state_dict()["steps"] == [4]
    assert copies[3].regularizer.layers == [] == copies[3]._fit.hooks


@pytest.mark.parametrize("again", [False, True])
def test_the_next_step_of_an_optimizer_whose_error_was_caught_moves_again(again):
    """In manual optimisation a user may catch what a step raises, and step ``again`` at once or with the next batch."""

    class Careful(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = Automatic().net, False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((self.net(batch[0]) - batch[1]).square().mean())
            try:
                optimizer.step(
                    lambda: (_ for _ in ()).throw(StopError()) if batch_idx == 2 else None
                )
            except StopError:
                if again:
                    optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = uniformity(coefficient=0.1, apply="decoupled")
    trainer(callback, max_epochs=1).fit(Careful(), loader(batches()))
    assert callback.state_dict()["steps"] == [7 if again else 6]


@pytest.mark.parametrize("end", ["on_fit_end", "teardown", "on_exception"])
def test_each_end_takes_the_hooks_off_by_itself(end):
    callback, seen = uniformity(apply="decoupled"), []

    class End(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            before = len(optimizer._optimizer_step_post_hooks)
            arguments = {"on_fit_end": (), "teardown": ("fit",), "on_exception": (StopError(),)}[
                end
            ]
            getattr(callback, end)(trainer, pl_module, *arguments)
            seen.append(
                (
                    before,
                    len(optimizer._optimizer_step_post_hooks),
                    len(optimizer._optimizer_step_pre_hooks),
                )
            )

    trainer(callback, End(), max_epochs=1).fit(Automatic(), loader(batches(2)))
    assert seen == [(1, 0, 0)]
