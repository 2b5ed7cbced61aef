"""The callback in a Trainer under mixed precision: the weights of a plain loop."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.gpu.machine import brief, require_backend
from benchmarks.gpu.runner import Report
from lightning_hsu import HypersphericalUniformity, UniformityRegularizer
from lightning_hsu._core import oracle_energy
from lightning_hsu.measures import RieszEnergy

MEASURE = RieszEnergy(s=2.0, half_space=True)
STEPS = 2
RATE = 0.05
COEFFICIENT = 0.3
CLOSE = 1e-4
"""How far weights may be from those of a loop whose penalty is computed in float64.

Relative to how far they have moved in all steps. Measured with bf16-mixed on a CPU: 6e-7.
"""

PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Module(pl.LightningModule):
    """A small classifier with a convolution, trained by SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 9, 40), nn.ReLU()
        )
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD, in one kernel a group."""
        return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)


def batches() -> list[tuple[Tensor, Tensor]]:
    """What all of them train on."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        images = torch.randn(16, 3, 8, 8, generator=generator)
        found.append((images, torch.randint(10, (16,), generator=generator)))
    return found


def compare(report: Report) -> None:
    """Two steps of the callback, of a plain loop with the engine, and of one in float64.

    The engine's loop does the same arithmetic: its weights are equal. The loop in float64 computes
    the penalty by differences: its weights are close.
    """
    device = report.settings.device
    require_backend("torch", device)
    for precision, dtype in PRECISIONS.items():
        if device == "cpu" and precision == "16-mixed":
            report.note("16-mixed needs a card: on a CPU Lightning takes bfloat16 instead")
            continue
        torch.manual_seed(0)
        start = Module()
        before = flat(start)
        try:
            trained = flat(by_trainer(start, precision, device))
            by_engine = flat(by_loop(start_again(), dtype, device, in_float64=False))
            by_float64 = flat(by_loop(start_again(), dtype, device, in_float64=True))
            without = flat(by_loop(start_again(), dtype, device, in_float64=None))
        except Exception as error:  # the other precision may work
            report.row(precision=precision, right=False, error=brief(error))
            continue
        moved = (by_float64 - before).norm()
        off = float((trained - by_float64).norm() / moved)
        share = float((by_float64 - without).norm() / moved)
        is_equal = torch.equal(trained, by_engine)
        report.row(
            precision=precision,
            right=is_equal and off < CLOSE < share,
            equal_to_the_engine_s_loop=is_equal,
            off_from_float64=off,
            bound=CLOSE,
            moved_by_the_penalty=share,
        )
    wrong = [row for row in report.rows if not row["right"]]
    if wrong:
        raise AssertionError(f"the callback differs from a plain loop: {wrong}")


def start_again() -> Module:
    """A module with the weights that all begin with."""
    torch.manual_seed(0)
    return Module()


def by_trainer(module: Module, precision: str, device: str) -> nn.Module:
    """Train with the callback."""
    callback = HypersphericalUniformity(MEASURE, COEFFICIENT, step_limit=None, share_limit=None)
    trainer = quiet_trainer(device, precision=precision, max_steps=STEPS, callbacks=[callback])
    loader = DataLoader(Examples(batches()), batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    return module.cpu()


class Examples(torch.utils.data.Dataset):
    """Batches that are there already."""

    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        self.found = found

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.found)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One of them."""
        return self.found[index]


def by_loop(
    module: Module, dtype: torch.dtype, device: str, *, in_float64: bool | None
) -> nn.Module:
    """Train in a plain loop: penalty by the engine, in float64, or None at all."""
    module.to(device).train()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    free = UniformityRegularizer(MEASURE, COEFFICIENT, step_limit=None, share_limit=None)
    regularizer = free.attach(module)
    for index, batch in enumerate(batches()):
        on_device = [part.to(device) for part in batch]
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = module.training_step(on_device, index)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if in_float64:
            add_in_float64(module)
        elif in_float64 is not None:
            regularizer.add_gradients(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return module.cpu()


def add_in_float64(module: Module) -> None:
    """Add the penalty's gradient by differences: half space in the body, full space in the head."""
    for layer in (module.net[0], module.net[3], module.head):
        measure = RieszEnergy(s=2.0, half_space=layer is not module.head)
        term = measure.pair_term()
        assert term is not None
        x = layer.weight.detach().double().flatten(1).requires_grad_()
        (grad,) = torch.autograd.grad(COEFFICIENT * oracle_energy(x, term), x)
        layer.weight.grad += grad.view_as(layer.weight).float()


def flat(module: nn.Module) -> Tensor:
    """All parameters in float64."""
    return torch.cat([p.detach().double().flatten() for p in module.parameters()])


def quiet_trainer(device: str, **settings: Any) -> pl.Trainer:
    """A Trainer that trains, and does nothing beside it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
