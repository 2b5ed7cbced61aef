"""A very large layer: its time, and its peak memory besides the weights and their gradient."""

from __future__ import annotations

import torch

from benchmarks.gpu.machine import backends, brief, milliseconds, require_backend, using
from benchmarks.gpu.runner import Report
from benchmarks.timing import spread
from lightning_hsu._core.foreach import add_pair_gradients
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import RieszEnergy

SHAPE = (50257, 768)
SMALL = (70, 17)
MEASURE = RieszEnergy(s=2.0, half_space=True)


def measure(report: Report) -> None:
    """One row for each back end."""
    device = report.settings.device
    require_backend("torch", device)
    n, d = SMALL if report.settings.quick else SHAPE
    if device == "cpu" and not report.settings.quick:
        report.note("on a CPU this takes minutes; --quick takes a small one")
    w = torch.randn(1, n, d, device=device)
    update = GradientUpdate(w, torch.zeros_like(w), 1.0)
    term = MEASURE.pair_term()
    assert term is not None
    for backend in backends(device):
        with using(backend):
            about = {"back end": backend, "neurons": n, "dimension": d}
            try:
                add_pair_gradients([update], term)  # compiles, captures
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                times = []
                for _ in range(3):
                    times.append(milliseconds(lambda: add_pair_gradients([update], term), device))
            except Exception as error:  # one back end says nothing about the others
                report.row(**about, error=brief(error))
                continue
            peak = "needs a card"
            if device == "cuda":
                peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
                torch.cuda.empty_cache()
            report.row(**about, ms=spread(times), **{"peak MiB": peak})
