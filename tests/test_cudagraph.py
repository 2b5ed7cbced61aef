"""Which CUDA graphs are kept, by a stand-in that records captures; no GPU is needed."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from lightning_hsu._core import cudagraph
from lightning_hsu._core.updates import GradientUpdate
from lightning_hsu.measures import RieszEnergy

BODY = RieszEnergy(s=2, half_space=True).pair_term()
HEAD = RieszEnergy(s=2).pair_term()


class Graph:
    """In place of torch's: notes what happens; a capture has computed its results already."""

    captures = 0
    modes = ()

    def replay(self):
        """The results are there."""


@contextmanager
def capture(graph, capture_error_mode="global"):
    Graph.captures += 1
    Graph.modes = (*Graph.modes, capture_error_mode)
    yield


class Stream:
    def wait_stream(self, other):
        """Nothing runs at the side."""


@pytest.fixture
def backend(monkeypatch):
    Graph.captures, Graph.modes = 0, ()
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return cudagraph.CudaGraphBackend()


def model(seed):
    """Body and head of one optimizer."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, 6, generator=generator) for n in (8, 5)]


def step(backend, weights):
    """What one optimizer's step asks for."""
    outs = []
    for w, term in zip(weights, (BODY, HEAD), strict=True):
        out = torch.zeros_like(w)
        backend.add_pair_gradients([GradientUpdate(w, out, 1.0)], term)
        outs.append(out)
    return outs


def test_three_optimizers_with_body_and_head_are_captured_once(backend):
    models = [model(seed) for seed in range(3)]
    for weights in models:
        assert all(float(out.norm()) > 0 for out in step(backend, weights))
    assert Graph.captures == 6
    for _ in range(3):
        for weights in models:
            step(backend, weights)
    assert Graph.captures == 6


def test_other_threads_do_not_break_a_capture(backend):
    step(backend, model(0))
    assert Graph.modes == ("thread_local", "thread_local")


def test_the_least_recently_used_goes_first(backend, monkeypatch):
    monkeypatch.setattr(cudagraph, "_KEPT", 4)
    first, second, third = models = [model(seed) for seed in range(3)]
    step(backend, first)
    step(backend, second)
    step(backend, first)
    step(backend, third)  # in the place of the second
    assert Graph.captures == 6
    step(backend, first)
    assert Graph.captures == 6
    step(backend, second)
    assert Graph.captures == 8
    assert len(backend._graphs) == 4
    assert len(models) == 3


def test_graphs_of_weights_that_are_gone_are_dropped(backend):
    for seed in range(5):
        weights = [torch.nn.Parameter(w) for w in model(seed)]
        views = [w.detach() for w in weights]
        step(backend, views)
        del views, weights
    assert len(backend._graphs) <= 2
