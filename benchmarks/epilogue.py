"""What torch.compile makes of the pass between the products for a GPU, looked at without one.

Inductor generates the kernels for tensors that only pretend to be on a CUDA device, and says how
many bytes they read and write. It reaches into inductor, whose parts move: written for torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from benchmarks.launches import Asked, Counting, plain_step
from lightning_hsu import UniformityRegularizer
from lightning_hsu._core.compiled import CompiledBackend
from lightning_hsu._core.foreach import TorchBackend
from lightning_hsu._core.fused import Fused, slopes_of, sums_of
from lightning_hsu._core.kernel import PairTerm

SIZES = {"slopes": (100_003,), "sums": (640, 768)}
"""Sizes of the cosines that stand for all others."""


class Generated(NamedTuple):
    """What was generated for one kernel.

    Args:
        traffic: Bytes an entry of the Gram matrix, as inductor counts them: tensors that are
            written to count as read as well.
        sources: The kernels in Triton's language.
    """

    traffic: float
    sources: list[str]


@lru_cache
def generated(term: PairTerm, form: str) -> Generated:
    """Generate code for a GPU.

    Args:
        term: The kernel.
        form: "slopes" for a plain step, "sums" with sums and largest cosines of the rows.
    """
    from torch._inductor import config
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    function: Callable[..., Any] = slopes_of(term)
    if form == "sums":
        function = partial(sums_of(term), beside=SIZES[form][0] // 2)
    with _pretended_card(), config.patch(force_disable_caches=True):
        graph_module, inputs, shapes, mode = _traced(function, SIZES[form])
        graph = GraphLowering(graph_module, inputs, shape_env=shapes, is_inference=True)
        with V.set_graph_handler(graph), V.set_fake_mode(mode):
            with V.set_debug_handler(DebugContext()):
                graph.run(*inputs)
                code = graph.codegen()[0]
                total = graph.count_bytes()[0]
    text = getattr(code, "value", code)
    sources = [part.split("''', device_str")[0] for part in text.split("async_compile.triton(")[1:]]
    sources = [source.partition("'''")[2] for source in sources]
    return Generated(total / prod(SIZES[form]), sources)


def _traced(
    function: Callable[..., Any], size: Sequence[int]
) -> tuple[torch.fx.GraphModule, list[Tensor], Any, Any]:
    """The graph of a function whose first two results are written to given tensors."""
    from torch._dynamo.source import ConstantSource
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    with mode, torch.no_grad():
        shape = []
        for n in size:
            source = ConstantSource(f"n{n}")
            symbol = env.create_symbol(n, source=source, dynamic_dim=DimDynamic.DYNAMIC)
            shape.append(env.create_symintnode(symbol, hint=n, source=source))
        inputs = [torch.empty(shape, device="cuda")]
        traced = make_fx(torch.func.functionalize(function), select_decomp_table())(*inputs)
        graph = traced.graph
        end = graph.output_node()
        results = list(end.args[0])
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        for i, dtype in enumerate((torch.float32, torch.bool)):
            out = torch.empty(inputs[0].shape, device="cuda", dtype=dtype)
            inputs.append(out)
            with graph.inserting_after(last):
                last = graph.placeholder(f"out{i}")
            with graph.inserting_before(end):
                copy = graph.call_function(torch.ops.aten.copy_.default, (last, results[i]))
            last.meta["val"] = copy.meta["val"] = out
        end.args = (tuple(results[2:]),)
        traced.recompile()
    return traced, inputs, env, mode


@contextmanager
def _pretended_card() -> Iterator[None]:
    """Within the block inductor believes that there is an H100."""
    from torch._inductor.runtime.hints import DeviceProperties

    card = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        warp_size=32,
    )
    answers = {
        "torch._inductor.scheduler.has_triton": True,
        "torch.utils._triton.has_triton": True,
        "torch.cuda.current_device": 0,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.get_device_properties": card,
        "torch.utils._triton.triton_hash_with_backend": "",
    }
    with ExitStack() as stack:
        # What is generated is for no card that is here.
        stack.enter_context(mock.patch("torch._inductor.async_compile.AsyncCompile.triton"))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=card))
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, return_value=answer))
        yield


class CountedTerm:
    """Stands for a compiled kernel where tensors only pretend to be on a device.

    Args:
        term: The kernel.
    """

    def __init__(self, term: PairTerm) -> None:
        self.term = term

    def slopes(self, cosine: Tensor, slope: Tensor, near: Tensor) -> None:
        """One launch."""
        _add(generated(self.term, "slopes").traffic * cosine.numel())

    def sums(
        self, cosine: Tensor, beside: int, slope: Tensor, near: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One launch."""
        _add(generated(self.term, "sums").traffic * cosine.numel())
        return cosine.new_empty(len(cosine)), cosine.new_empty(len(cosine))


def _add(traffic: float) -> None:
    """Count a launch."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, Counting):
            mode.asked.launches += 1
            mode.asked.traffic += traffic
            mode.asked.calls["compiled"] += 1


def plain_compiled_step(name: str) -> Asked:
    """What a plain step of a model asks of a GPU with the back end "compiled"."""
    kept: dict[PairTerm, CountedTerm] = {}
    backend = CompiledBackend()

    def counted(batch: Any, *, with_sums: bool) -> Fused:
        terms: list[Any] = [kept[term] for term in batch.terms]
        return Fused(terms, with_sums=with_sums)

    def gradients(self: TorchBackend, batch: Any, *, stats: bool = False) -> Any:
        return backend.gradients(batch, stats=stats)

    measure = UniformityRegularizer().measure
    for one in (measure, measure.for_head()):
        term = one.pair_term()
        assert term is not None
        kept[term] = CountedTerm(term)
    with mock.patch.object(backend, "_fused", counted):
        with mock.patch.multiple(TorchBackend, gradients=gradients, compiles=True):
            return plain_step(name)
