"""The structures of layers and models that are out there, in miniature: names, shapes, heads, values.

``tests/real_models`` has the models themselves, which need their libraries.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lightning_hsu import UniformityRegularizer, register_neurons, summarize
from lightning_hsu._neurons.rules import _RULES
from tests.plain import HALF_SPACE
from tests.real_models.test_models import double_loop
from tests.test_adapters import TorchtuneLinear

EXACT = 1e-4  # of a gradient's largest entry, in float32


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]))


def as_if_of(library: str) -> Callable[[type], type]:
    """The class with the module that it has in its library, where a square weight is told by it."""

    def rename(kind: type) -> type:
        kind.__module__ = library
        kind.__qualname__ = kind.__name__
        return kind

    return rename


# Layers.


@as_if_of("transformers.pytorch_utils")
class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = weight(nx, nf)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = Conv1D(8, 6)
        self.c_proj = Conv1D(6, 8)
        self.square = Conv1D(6, 6)
        self.lm_head = nn.Linear(6, 10, bias=False)

    def forward(self, x):
        return self.lm_head(self.square(self.c_proj(F.gelu(self.c_fc(x)))))


class Router(nn.Module):
    def __init__(self, experts, width):
        super().__init__()
        self.num_experts, self.hidden_dim = experts, width
        self.weight = weight(experts, width)

    def forward(self, x):
        return F.linear(x, self.weight).softmax(-1)


class MixtralExperts(nn.Module):
    is_concatenated = True

    def __init__(self, experts=3, width=4, inner=5):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, width, inner
        self.is_transposed = False
        self.gate_up_proj = weight(experts, 2 * inner, width)
        self.down_proj = weight(experts, width, inner)

    def forward(self, x, scores):
        gate, up = torch.einsum("bi,eoi->beo", x, self.gate_up_proj).chunk(2, dim=-1)
        y = torch.einsum("beo,eio->bei", F.silu(gate) * up, self.down_proj)
        return (y * scores[..., None]).sum(1)


class GptOssExperts(nn.Module):
    def __init__(self, experts=3, width=4, inner=5):
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = experts, width, inner
        self.is_transposed, self.is_concatenated = True, False
        self.gate_up_proj = weight(experts, width, 2 * inner)
        self.gate_up_proj_bias = weight(experts, 2 * inner)
        self.down_proj = weight(experts, inner, width)

    def forward(self, x, scores):
        both = torch.einsum("bi,eio->beo", x, self.gate_up_proj) + self.gate_up_proj_bias
        y = torch.einsum("beo,eoi->bei", both[..., ::2].sigmoid() * both[..., 1::2], self.down_proj)
        return (y * scores[..., None]).sum(1)


class DbrxExpertGLU(nn.Module):
    def __init__(self, experts=3, width=4, inner=5):
        super().__init__()
        self.moe_num_experts, self.hidden_size, self.ffn_hidden_size = experts, width, inner
        self.w1 = weight(experts * inner, width)
        self.v1 = weight(experts * inner, width)
        self.w2 = weight(experts * inner, width)

    def forward(self, x, scores):
        shape = self.moe_num_experts, self.ffn_hidden_size, self.hidden_size
        w1, v1, w2 = (w.view(shape) for w in (self.w1, self.v1, self.w2))
        hidden = torch.einsum("bi,eoi->beo", x, w1) * torch.einsum("bi,eoi->beo", x, v1)
        return (torch.einsum("beo,eoi->bei", hidden, w2) * scores[..., None]).sum(1)


class Mixture(nn.Module):
    """Experts behind a router."""

    def __init__(self, experts, auxiliary=False):
        super().__init__()
        self.router = Router(3, 4)
        self.experts = experts
        self.head = nn.Linear(4, 7)
        self.auxiliary = auxiliary

    def forward(self, x):
        scores = self.router(x)
        y = self.head(x + self.experts(x, scores))
        return (y, scores.mean(0)) if self.auxiliary else y


class GraniteMoeParallelExperts(nn.Module):
    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.num_experts, self.input_size, self.output_size = num_experts, input_size, output_size
        self.weight = weight(num_experts, output_size, input_size)

    def forward(self, x):
        return torch.stack([F.linear(one, w) for one, w in zip(x, self.weight, strict=True)])


class GraniteMoe(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_linear = GraniteMoeParallelExperts(3, 4, 10)
        self.output_linear = GraniteMoeParallelExperts(3, 5, 4)
        self.lm_head = nn.Linear(4, 7)

    def forward(self, x):
        gate, up = self.input_linear(x.expand(3, *x.shape)).chunk(2, dim=-1)
        return self.lm_head(self.output_linear(F.silu(gate) * up).sum(0))


@as_if_of("torch_geometric.nn.dense.linear")
class HeteroLinear(nn.Module):
    def __init__(self, in_channels, out_channels, num_types):
        super().__init__()
        self.in_channels, self.out_channels, self.num_types = in_channels, out_channels, num_types
        self.weight = weight(num_types, in_channels, out_channels)

    def forward(self, x):
        return torch.einsum("bi,tio->bto", x, self.weight).sum(1)


def geometric_linear(in_channels, out_channels):
    @as_if_of("torch_geometric.nn.dense.linear")
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channels, self.out_channels = in_channels, out_channels
            self.weight = weight(out_channels, in_channels)

        def forward(self, x):
            return F.linear(x, self.weight)

    return Linear()


@as_if_of("e3nn.nn._fc")
class _Layer(nn.Module):
    def __init__(self, h_in, h_out):
        super().__init__()
        self.h_in, self.h_out = h_in, h_out
        self.weight = weight(h_in, h_out)

    def forward(self, x):
        return x @ (self.weight / math.sqrt(self.h_in))


class KanLinear(nn.Module):
    def __init__(self, in_features, out_features, coefficients=4):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("grid", torch.linspace(-1, 1, coefficients).expand(in_features, -1))
        self.base_weight = weight(out_features, in_features)
        self.spline_weight = weight(out_features, in_features, coefficients)
        self.spline_scaler = nn.Parameter(torch.ones(out_features, in_features))

    def forward(self, x):
        basis = torch.exp(-(x[..., None] - self.grid).square()).flatten(1)
        spline = (self.spline_weight * self.spline_scaler[..., None]).flatten(1)
        return F.linear(F.silu(x), self.base_weight) + F.linear(basis, spline)


class TimmAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):  # (tokens, 8)
        q, k, v = self.qkv(x).view(-1, 3, 2, 4).permute(1, 2, 0, 3)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class MegatronAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_attention_heads, self.head_dim = 2, 4
        self.query_key_value = nn.Linear(8, 24)
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.query_key_value(x).view(-1, 2, 3, 4).permute(2, 1, 0, 3)
        return self.dense(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Linear(8, 12)
        self.down_proj = nn.Linear(6, 8)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class MambaMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.intermediate_size, self.ssm_state_size, self.time_step_rank = 8, 3, 2
        self.conv1d = nn.Conv1d(8, 8, 4, groups=8, padding=3)
        self.in_proj = nn.Linear(8, 16)
        self.x_proj = nn.Linear(8, 8)
        self.dt_proj = nn.Linear(2, 8)
        self.A_log = weight(8, 3)
        self.D = nn.Parameter(torch.ones(8))
        self.out_proj = nn.Linear(8, 8)

    def forward(self, x):
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.T)[:, : len(x)].T)
        dt, b, c = self.x_proj(x).split([2, 3, 3], dim=-1)
        decay = F.softplus(self.dt_proj(dt))[..., None] * -self.A_log.exp()
        y = ((decay.exp() * b[:, None] + x[..., None]) * c[:, None]).sum(-1) + x * self.D
        return self.out_proj(y * F.silu(z))


class StdConv2d(nn.Conv2d):
    def forward(self, x):
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)
        return F.conv2d(x, w.view_as(self.weight), self.bias)


def before_a_head(layer, width=8):
    return nn.Sequential(layer, nn.Linear(width, 5))


# Dictionaries, codebooks and prototypes.


class SparseAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_enc = weight(4, 12)
        self.W_dec = weight(12, 4)

    def forward(self, x):
        codes = F.relu(x @ self.W_enc)
        return codes @ self.W_dec, codes


class LinearAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 12)
        self.decoder = nn.Linear(12, 4)

    def forward(self, x):
        codes = F.relu(self.encoder(x))
        return self.decoder(codes), codes


class EuclideanCodebook(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("embed", torch.randn(6, 4))
        self.register_buffer("cluster_size", torch.zeros(6))

    def forward(self, x):
        with torch.no_grad():
            codes = self.embed[torch.cdist(x, self.embed).argmin(1)]
        return x + (codes - x).detach(), (codes - x).square().mean()


class VectorQuantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(5, 4)
        self.codebook = EuclideanCodebook()
        self.decoder = nn.Linear(4, 5)

    def forward(self, x):
        z, commitment = self.codebook(self.encoder(x))
        return self.decoder(z), commitment


class Prototypes(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        self.register_parameter(name, weight(5, 4))
        self.name = name

    def forward(self, x):
        return F.normalize(self.embed(x)) @ F.normalize(getattr(self, self.name)).T


# Models.


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Linear(6, 8)
        self.transformer = nn.Linear(5, 8)
        self.proj = weight(8, 4)
        self.text_projection = weight(8, 4)

    def forward(self, images, texts):
        a = F.normalize(F.relu(self.visual(images)) @ self.proj)
        b = F.normalize(F.relu(self.transformer(texts)) @ self.text_projection)
        return a @ b.T


def mlp(*sizes):
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Classifier(nn.Module):
    """As in timm: it declares what its head is."""

    def __init__(self, classes=5):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.fc = nn.Linear(8, classes)

    def get_classifier(self):
        return self.fc

    def features(self, x):
        return F.relu(self.stem(x))

    def forward(self, x):
        return self.fc(self.features(x))


class Distillation(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = mlp(6, 4, 5)
        self.teacher = Classifier().requires_grad_(False)

    def forward(self, x):
        return self.student(x) - self.teacher(x)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(6, 8, 5)
        self.average = AveragedModel(self.net)

    def forward(self, x):
        with torch.no_grad():
            target = self.average(x)
        return self.net(x) - target


class Perceptual(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = mlp(6, 8, 6)
        self.lpips = mlp(6, 8, 4).requires_grad_(False)

    def forward(self, x):
        return self.lpips(self.generator(x)) - self.lpips(x)


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(6, 8)
        self.class_embed = nn.Linear(8, 5)
        self.bbox_embed = mlp(8, 8, 4)

    def forward(self, x):
        x = F.relu(self.decoder(x))
        return {"logits": self.class_embed(x), "boxes": self.bbox_embed(x).sigmoid()}


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.encoder = nn.Linear(6, 8)

    def forward(self, x):
        return self.layer(F.relu(self.encoder(x)))


class Excite(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        scale = self.up(F.relu(self.down(x.mean((2, 3))))).sigmoid()
        return x * scale[:, :, None, None]


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.excite = Excite()
        self.predict = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.predict(self.excite(F.relu(self.stem(x))))


class Tied(nn.Module):
    """The embedding's table gives the logits, by no layer at all."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.body = nn.Linear(4, 4)
        self.out = lambda x: x @ self.words.weight.T

    def forward(self, words):
        return self.out(self.body(self.words(words)))


class HierarchicalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 6 + 3)

    def forward(self, x):
        return self.out(F.relu(self.hidden(x))).split([6, 3], dim=-1)


class Hierarchical(nn.Module):
    """As N-HiTS: each block explains a part of the past, and adds a part of the forecast."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(HierarchicalBlock() for _ in range(3))

    def forward(self, x):
        total = x.new_zeros(len(x), 3)
        for block in self.blocks:
            past, forecast = block(x)
            x = x - past
            total = total + forecast
        return total


class Variational(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.decoder = mlp(4, 8, 6)
        self.mu = nn.Linear(8, 4)
        self.logvar = nn.Linear(8, 4)

    def forward(self, x):
        hidden = F.relu(self.encoder(x))
        mu, logvar = self.mu(hidden), self.logvar(hidden)
        z = mu + torch.randn_like(mu) * (logvar / 2).exp()
        return self.decoder(z), mu, logvar


class WithHidden(nn.Module):
    """As in transformers: the states of the layers come beside the logits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.score = nn.Linear(6, 5)

    def forward(self, x):
        states = []
        for layer in self.layers:
            x = F.relu(layer(x))
            states.append(x)
        return {"logits": self.score(x), "hidden_states": tuple(states)}


class Larger(nn.Module):
    """A head of its own on the features of a backbone, whose own classifier is not used."""

    def __init__(self):
        super().__init__()
        self.backbone = Classifier()
        self.mine = nn.Linear(8, 3)

    def forward(self, x):
        return self.mine(self.backbone.features(x))


class WeightDrop(nn.Module):
    """As in the AWD-LSTM: the weight is set anew in each forward pass."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(6, 8)
        raw = self.module.weight
        del self.module.weight
        self.module.weight_raw = raw
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        self.module.weight = F.dropout(self.module.weight_raw, 0.1)
        return self.head(self.module(x))


class Hypernetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.hidden = nn.Linear(3, 7)
        self.weights = nn.Linear(7, 5 * 4)

    def forward(self, x):
        generated = self.weights(F.relu(self.hidden(torch.ones(1, 3)))).view(5, 4)
        return F.linear(F.relu(self.first(x)), generated)


def squares(outputs):
    """A loss that reaches all outputs."""
    if isinstance(outputs, Tensor):
        return outputs.square().mean()
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return sum(squares(one) for one in values)


@dataclass
class Structure:
    """What is expected of a model.

    Args:
        name: What it is.
        build: Makes it.
        inputs: Shapes of its inputs, or the inputs themselves.
        shapes: (groups, n, d) of all that is measured, by name.
        heads: Names of the heads after a loss is known.
        skipped: What is left out, with a word of the reason.
        early: Names of the heads before any forward pass; None if they are not known.
        loss: The loss of the model's outputs.
        reads: A set of neurons by name: its parameter, and how an expert reads it.
        frozen: Names of what does not train.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple
    shapes: dict[str, tuple[int, int, int]]
    heads: set[str]
    skipped: dict[str, str] = field(default_factory=dict)
    early: set[str] | None = None
    loss: Callable = squares
    reads: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)

    def run(self, model):
        inputs = [one if isinstance(one, Tensor) else torch.randn(one) for one in self.inputs]
        return model(*inputs)


def flat(w):
    return w.flatten(1)


ROUTER = {"router": (1, 3, 4)}
HEAD = {"1": (1, 5, 8)}

STRUCTURES = [
    Structure(
        "Conv1D of transformers",
        Gpt,
        ((7, 6),),
        {
            "c_fc": (1, 8, 6),
            "c_proj": (1, 6, 8),
            "square": (1, 6, 6),
            "lm_head": (1, 10, 6),
        },
        {"lm_head"},
        early={"lm_head"},
        reads={"square": ("square.weight", lambda w: w.T), "c_fc": ("c_fc.weight", lambda w: w.T)},
    ),
    Structure(
        "Mixtral",
        lambda: Mixture(MixtralExperts()),
        ((7, 4),),
        {
            **ROUTER,
            "experts.gate_up_proj.gate": (3, 5, 4),
            "experts.gate_up_proj.up": (3, 5, 4),
            "experts.down_proj": (3, 4, 5),
            "head": (1, 7, 4),
        },
        {"head"},
        early={"head"},
        reads={"experts.gate_up_proj.up": ("experts.gate_up_proj", lambda w: w[:, 5:])},
    ),
    Structure(
        "GPT-OSS",
        lambda: Mixture(GptOssExperts()),
        ((7, 4),),
        {
            **ROUTER,
            "experts.gate_up_proj.gate": (3, 5, 4),
            "experts.gate_up_proj.up": (3, 5, 4),
            "experts.down_proj": (3, 4, 5),
            "head": (1, 7, 4),
        },
        {"head"},
        {"experts.gate_up_proj_bias": "biases"},
        early={"head"},
        reads={
            "experts.gate_up_proj.gate": ("experts.gate_up_proj", lambda w: w[:, :, ::2].mT),
            "experts.down_proj": ("experts.down_proj", lambda w: w.mT),
        },
    ),
    Structure(
        "square experts of GPT-OSS",
        lambda: Mixture(GptOssExperts(width=4, inner=4)),
        ((7, 4),),
        {
            **ROUTER,
            "experts.gate_up_proj.gate": (3, 4, 4),
            "experts.gate_up_proj.up": (3, 4, 4),
            "experts.down_proj": (3, 4, 4),
            "head": (1, 7, 4),
        },
        {"head"},
        {"experts.gate_up_proj_bias": "biases"},
        reads={"experts.down_proj": ("experts.down_proj", lambda w: w.mT)},
    ),
    Structure(
        "DBRX",
        lambda: Mixture(DbrxExpertGLU()),
        ((7, 4),),
        {
            **ROUTER,
            "experts.w1": (3, 5, 4),
            "experts.v1": (3, 5, 4),
            "experts.w2": (3, 4, 5),
            "head": (1, 7, 4),
        },
        {"head"},
        early={"head"},
        reads={
            "experts.w1": ("experts.w1", lambda w: w.view(3, 5, 4)),
            "experts.w2": ("experts.w2", lambda w: w.view(3, 5, 4).mT),
        },
    ),
    Structure(
        "GraniteMoe",
        GraniteMoe,
        ((7, 4),),
        {
            "input_linear.gate": (3, 5, 4),
            "input_linear.up": (3, 5, 4),
            "output_linear": (3, 4, 5),
            "lm_head": (1, 7, 4),
        },
        {"lm_head"},
        early={"lm_head"},
        reads={"output_linear": ("output_linear.weight", lambda w: w)},
    ),
    Structure(
        "the auxiliary loss of a router",
        lambda: Mixture(MixtralExperts(), auxiliary=True),
        ((7, 4),),
        {
            **ROUTER,
            "experts.gate_up_proj.gate": (3, 5, 4),
            "experts.gate_up_proj.up": (3, 5, 4),
            "experts.down_proj": (3, 4, 5),
            "head": (1, 7, 4),
        },
        {"head"},
        early={"head"},
    ),
    Structure(
        "torch_geometric",
        lambda: nn.Sequential(
            geometric_linear(6, 6), HeteroLinear(6, 6, 3), geometric_linear(6, 5)
        ),
        ((7, 6),),
        {"0": (1, 6, 6), "1": (3, 6, 6), "2": (1, 5, 6)},
        {"2"},
        early={"2"},
        reads={"0": ("0.weight", lambda w: w), "1": ("1.weight", lambda w: w.mT)},
    ),
    Structure(
        "e3nn",
        lambda: nn.Sequential(_Layer(6, 6), nn.Tanh(), _Layer(6, 5)),
        ((7, 6),),
        {"0": (1, 6, 6), "2": (1, 5, 6)},
        {"2"},
        early={"2"},
        reads={"0": ("0.weight", lambda w: w.T)},
    ),
    Structure(
        "KAN",
        lambda: nn.Sequential(KanLinear(6, 8), KanLinear(8, 5)),
        ((7, 6),),
        {
            "0.base_weight": (1, 8, 6),
            "0.spline_weight": (1, 8, 24),
            "1.base_weight": (1, 5, 8),
            "1.spline_weight": (1, 5, 32),
        },
        {"1.base_weight", "1.spline_weight"},
        {"0.spline_scaler": "factor", "1.spline_scaler": "factor"},
        reads={"0.spline_weight": ("0.spline_weight", flat)},
    ),
    Structure(
        "attention of timm",
        lambda: before_a_head(TimmAttention()),
        ((7, 8),),
        {f"0.qkv.{key}": (1, 8, 8) for key in "qkv"} | {"0.proj": (1, 8, 8)} | HEAD,
        {"1"},
        early={"1"},
        reads={"0.qkv.k": ("0.qkv.weight", lambda w: w[8:16])},
    ),
    Structure(
        "attention of Megatron",
        lambda: before_a_head(MegatronAttention()),
        ((7, 8),),
        {f"0.query_key_value.{key}": (1, 8, 8) for key in "qkv"} | {"0.dense": (1, 8, 8)} | HEAD,
        {"1"},
        early={"1"},
        reads={
            "0.query_key_value.k": (
                "0.query_key_value.weight",
                lambda w: w.view(2, 3, 4, 8)[:, 1].reshape(8, 8),
            )
        },
    ),
    Structure(
        "gated MLP",
        lambda: before_a_head(GatedMlp()),
        ((7, 8),),
        {"0.gate_up_proj.gate": (1, 6, 8), "0.gate_up_proj.up": (1, 6, 8), "0.down_proj": (1, 8, 6)}
        | HEAD,
        {"1"},
        early={"1"},
    ),
    Structure(
        "Mamba",
        lambda: before_a_head(MambaMixer()),
        ((7, 8),),
        {
            "0.in_proj.x": (1, 8, 8),
            "0.in_proj.z": (1, 8, 8),
            "0.x_proj.dt": (1, 2, 8),
            "0.x_proj.B": (1, 3, 8),
            "0.x_proj.C": (1, 3, 8),
            "0.dt_proj": (1, 8, 2),
            "0.out_proj": (1, 8, 8),
        }
        | HEAD,
        {"1"},
        {"0.conv1d": "depthwise", "0.A_log": "a factor"},
        early={"1"},
    ),
    Structure(
        "weight standardisation",
        lambda: nn.Sequential(StdConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)),
        ((2, 3, 6, 6),),
        {"0": (1, 8, 27), "2": (1, 5, 72)},
        {"2"},
        reads={"0": ("0.weight", lambda w: flat(w) - flat(w).mean(1, keepdim=True))},
    ),
    Structure(
        "sparse autoencoder of two parameters",
        SparseAutoencoder,
        ((7, 4),),
        {"W_enc": (1, 12, 4), "W_dec": (1, 12, 4)},
        {"W_dec"},
        reads={"W_enc": ("W_enc", lambda w: w.T), "W_dec": ("W_dec", lambda w: w)},
    ),
    Structure(
        "sparse autoencoder of two Linears",
        LinearAutoencoder,
        ((7, 4),),
        {"encoder": (1, 12, 4), "decoder": (1, 12, 4)},
        {"decoder"},
        early=set(),  # a dictionary's rows are not an output layer before a forward pass shows it
        reads={"decoder": ("decoder.weight", lambda w: w.T)},
    ),
    Structure(
        "vector quantiser",
        VectorQuantizer,
        ((7, 5),),
        {"encoder": (1, 4, 5), "codebook.embed": (1, 6, 4), "decoder": (1, 5, 4)},
        {"decoder"},
        early={"decoder"},
        frozen={"codebook.embed"},
    ),
    *[
        Structure(
            name,
            lambda name=name: Prototypes(name),
            ((7, 6),),
            {"embed.0": (1, 8, 6), "embed.2": (1, 4, 8), name: (1, 5, 4)},
            {name},
            reads={name: (name, lambda w: w)},
        )
        for name in ("prototypes", "centers", "proxies")
    ],
    Structure(
        "CLIP",
        Clip,
        ((7, 6), (7, 5)),
        {
            "visual": (1, 8, 6),
            "transformer": (1, 8, 5),
            "proj": (1, 4, 8),
            "text_projection": (1, 4, 8),
        },
        {"proj", "text_projection"},
        reads={"proj": ("proj", lambda w: w.T)},
    ),
    Structure(
        "student and frozen teacher",
        Distillation,
        ((7, 6),),
        {
            "student.0": (1, 4, 6),
            "student.2": (1, 5, 4),
            "teacher.stem": (1, 8, 6),
            "teacher.fc": (1, 5, 8),
        },
        {"student.2"},
        early={"student.2"},
        frozen={"teacher.stem", "teacher.fc"},
    ),
    Structure(
        "averaged copy",
        Averaged,
        ((7, 6),),
        {
            "net.0": (1, 8, 6),
            "net.2": (1, 5, 8),
            "average.module.0": (1, 8, 6),
            "average.module.2": (1, 5, 8),
        },
        {"net.2"},
        early={"net.2"},
        frozen={"average.module.0", "average.module.2"},
    ),
    Structure(
        "frozen net in the loss",
        Perceptual,
        ((7, 6),),
        {
            "generator.0": (1, 8, 6),
            "generator.2": (1, 6, 8),
            "lpips.0": (1, 8, 6),
            "lpips.2": (1, 4, 8),
        },
        {"generator.2"},
        early={"generator.2"},
        frozen={"lpips.0", "lpips.2"},
    ),
    Structure(
        "DETR",
        Detector,
        ((7, 6),),
        {
            "decoder": (1, 8, 6),
            "class_embed": (1, 5, 8),
            "bbox_embed.0": (1, 8, 8),
            "bbox_embed.2": (1, 4, 8),
        },
        {"class_embed", "bbox_embed.2"},
    ),
    Structure(
        "head registered first",
        HeadFirst,
        ((7, 6),),
        {"layer": (1, 2, 8), "encoder": (1, 8, 6)},
        {"layer"},
    ),
    Structure(
        "Segformer",
        Segmenter,
        ((2, 3, 6, 6),),
        {
            "stem": (1, 8, 27),
            "excite.down": (1, 2, 8),
            "excite.up": (1, 8, 2),
            "predict": (1, 5, 8),
        },
        {"predict"},
        early={"predict"},
    ),
    Structure(
        "tied output embedding used by a lambda",
        Tied,
        (torch.arange(7),),
        {"words": (1, 9, 4), "body": (1, 4, 4)},
        {"words"},
    ),
    Structure(
        "N-HiTS",
        Hierarchical,
        ((7, 6),),
        {f"blocks.{i}.hidden": (1, 8, 6) for i in range(3)}
        | {f"blocks.{i}.out": (1, 9, 8) for i in range(3)},
        {f"blocks.{i}.out" for i in range(3)},
    ),
    Structure(
        "variational autoencoder",
        Variational,
        ((7, 6),),
        {
            "encoder": (1, 8, 6),
            "decoder.0": (1, 8, 4),
            "decoder.2": (1, 6, 8),
            "mu": (1, 4, 8),
            "logvar": (1, 4, 8),
        },
        {"decoder.2"},
    ),
    Structure(
        "hidden states beside the logits",
        WithHidden,
        ((7, 6),),
        {"layers.0": (1, 6, 6), "layers.1": (1, 6, 6), "score": (1, 5, 6)},
        {"score"},
        early={"score"},
        loss=lambda outputs: outputs["logits"].square().mean(),
    ),
    Structure(
        "unused classifier of a backbone",
        Larger,
        ((7, 6),),
        {"backbone.stem": (1, 8, 6), "backbone.fc": (1, 5, 8), "mine": (1, 3, 8)},
        {"mine"},
    ),
    Structure(
        "dropped weights",
        WeightDrop,
        ((7, 6),),
        {"head": (1, 5, 8)},
        {"head"},
        {"module": "in the forward pass"},
        early={"head"},
    ),
    Structure(
        "hypernetwork",
        Hypernetwork,
        ((7, 6),),
        {"first": (1, 4, 6), "hidden": (1, 7, 3), "weights": (1, 20, 7)},
        {"first", "weights"},  # as two towers: each path ends in a product of what both give
    ),
]


@pytest.fixture(params=STRUCTURES, ids=lambda one: one.name)
def structure(request):
    return request.param


def shapes_of(summary):
    return {layer.name: layer.shape for layer in summary.layers}


def heads_of(summary):
    return {layer.name for layer in summary.layers if layer.is_head}


def reasons_of(summary):
    return {skip.name: skip.reason for skip in summary.skipped}


def test_names_shapes_and_reasons_before_a_forward_pass(structure):
    summary = summarize(structure.build())
    shapes = shapes_of(summary)
    # A head by the name of an embedding is known after the loss.
    late = {name for name in structure.heads if name not in shapes}
    assert shapes == {n: shape for n, shape in structure.shapes.items() if n not in late}
    reasons = reasons_of(summary)
    assert set(reasons) == set(structure.skipped) | late
    for name, word in structure.skipped.items():
        assert word in reasons[name]
    frozen = {layer.name for layer in summary.layers if not layer.trainable}
    assert frozen == structure.frozen
    if structure.early is not None:
        assert heads_of(summary) == structure.early


def test_names_shapes_and_heads_after_the_loss(structure):
    model = structure.build()
    loss = structure.loss(structure.run(model))
    regularizer = UniformityRegularizer().attach(model, watch=False)
    regularizer.find_head(loss)
    summary = regularizer.summary
    assert shapes_of(summary) == structure.shapes
    assert heads_of(summary) == structure.heads
    assert set(reasons_of(summary)) == set(structure.skipped)


def test_the_heads_of_a_plain_loop(structure):
    """What the model returns shows the same heads, without the loss."""
    model = structure.build()
    regularizer = UniformityRegularizer().attach(model)
    assert len(model._forward_hooks) == 1
    structure.run(model)
    assert heads_of(regularizer.summary) == structure.heads


@pytest.mark.parametrize(
    ("structure", "name"),
    [(one, name) for one in STRUCTURES for name in one.reads],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_gradient_of(structure, name):
    """What is added equals autograd through a float64 double loop over pairs."""
    model = structure.build()
    loss = structure.loss(structure.run(model))
    regularizer = UniformityRegularizer(HALF_SPACE, 1.0, step_limit=None)
    regularizer.attach(model, watch=False)
    regularizer.find_head(loss)
    where, take = structure.reads[name]
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    trained = [p for p in parameters.values() if p.requires_grad]
    regularizer.add_gradients(torch.optim.SGD(trained, lr=0.1))
    w = parameters[where].detach().double().requires_grad_()
    x = take(w)
    x = x[None] if x.ndim == 2 else x
    assert structure.shapes[name] == tuple(x.shape)
    half_space = name not in structure.heads
    penalty = sum(double_loop(group, half_space) for group in x) / len(x)
    (expected,) = torch.autograd.grad(penalty, w, retain_graph=True)
    (belongs,) = torch.autograd.grad(x.sum(), w, retain_graph=True)
    (square,) = torch.autograd.grad(x.square().sum(), w)
    own = (belongs != 0) | (square != 0)  # other parts of a fused weight have gradients, too
    error = (parameters[where].grad.double() - expected)[own].abs().max()
    assert error <= EXACT * expected.abs().max()


# Weights that cannot be read.


def quantised(_):
    return torch.ones(4, 5, dtype=torch.int8)


def nested(_):
    return torch.nested.nested_tensor([torch.ones(2, 2), torch.ones(3, 2)])


UNREADABLE = {
    "sparse": (lambda w: w.to_sparse(), "sparse"),
    "complex": (lambda w: w.to(torch.complex64), "complex"),
    "meta": (lambda w: w.to("meta"), "meta"),
    "nested": (nested, "nested"),
    "int": (quantised, "torch.int8, not floating-point"),
}


@pytest.mark.filterwarnings("ignore")  # torch calls some of these layouts a prototype
@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("bare", [False, True])
def test_weights_that_cannot_be_read(kind, bare):
    make, word = UNREADABLE[kind]
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    if bare:
        model[0] = nn.Module()
    values = make(torch.randn(4, 5))
    trains = values.is_floating_point() or values.is_complex()
    model[0].weight = nn.Parameter(values, requires_grad=trains)
    summary = summarize(model)
    assert shapes_of(summary) == {"1": (1, 3, 4)}
    assert heads_of(summary) == {"1"}
    assert set(reasons_of(summary)) == {"0"}
    assert word in reasons_of(summary)["0"]
    assert "0" in str(summary)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_weights_that_cannot_be_read_although_they_are_asked_for(kind):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    values = UNREADABLE[kind][0](torch.randn(4, 5))
    trains = values.is_floating_point() or values.is_complex()
    model[0].weight = nn.Parameter(values, requires_grad=trains)
    summary = summarize(model, neurons={"0": "columns"})
    assert shapes_of(summary) == {"1": (1, 3, 4)}
    assert set(reasons_of(summary)) == {"0"}


# What the user says.


class Bare(nn.Module):
    """What no rule takes in by itself."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0)
        self.matrix = weight(6, 4)
        self.stack = weight(3, 6, 4)
        self.blocks = weight(2, 3, 6, 4)
        self.linear = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(4)


WORDS = {
    "embedding": ({"words": "rows"}, {"words": lambda m: m.words.weight[1:]}),
    "rows of a parameter": ({"matrix": "rows"}, {"matrix": lambda m: m.matrix}),
    "columns of a parameter": ({"matrix": "columns"}, {"matrix": lambda m: m.matrix.T}),
    "rows of a stack": ({"stack": "rows"}, {"stack": lambda m: m.stack}),
    "columns of a stack": ({"stack": "columns"}, {"stack": lambda m: m.stack.mT}),
    "rows of four axes": ({"blocks": "rows"}, {"blocks": lambda m: m.blocks.flatten(0, 1)}),
    "columns of four axes": (
        {"blocks": "columns"},
        {"blocks": lambda m: m.blocks.flatten(0, 1).mT},
    ),
    "parts": (
        {"matrix": 3},
        {f"matrix.{i}": lambda m, i=i: m.matrix[2 * i : 2 * i + 2] for i in range(3)},
    ),
    "one part": ({"matrix": 1}, {"matrix": lambda m: m.matrix}),
    "parts of a stack": (
        {"stack": 2},
        {f"stack.{i}": lambda m, i=i: m.stack[:, 3 * i : 3 * i + 3] for i in range(2)},
    ),
    "parts of a Linear": (
        {"linear": 2},
        {f"linear.{i}": lambda m, i=i: m.linear.weight[3 * i : 3 * i + 3] for i in range(2)},
    ),
    "function": ({"matrix": lambda w: w.T[:3]}, {"matrix": lambda m: m.matrix.T[:3]}),
    "function that gives four axes": (
        {"blocks": lambda w: w.mT},
        {"blocks": lambda m: m.blocks.mT.flatten(0, 1)},
    ),
    "columns of a Linear": ({"linear": "columns"}, {"linear": lambda m: m.linear.weight.T}),
    "its full name": ({"linear.weight": "columns"}, {"linear": lambda m: m.linear.weight.T}),
    "pattern": (
        {"m*x": "rows", "st?ck": "rows"},
        {"matrix": lambda m: m.matrix, "stack": lambda m: m.stack},
    ),
    "the first pattern that matches": (
        {"matrix": "columns", "[ms]*t[ra][rc]*": "rows"},
        {"matrix": lambda m: m.matrix.T, "stack": lambda m: m.stack},
    ),
}


def grouped(x):
    return x[None] if x.ndim == 2 else x


@pytest.mark.parametrize("words", WORDS)
def test_what_the_user_says_is_taken_in(words):
    neurons, expected = WORDS[words]
    model = Bare()
    regularizer = UniformityRegularizer(head=None, neurons=neurons).attach(model)
    found = {layer.name: layer.target.neurons() for layer in regularizer.layers}
    default = {} if any(name.startswith("linear") for name in expected) else {"linear"}
    assert set(found) == set(expected) | set(default)
    for name, take in expected.items():
        assert torch.equal(found[name], grouped(take(model)))
        layer = next(one for one in regularizer.summary.layers if one.name == name)
        assert layer.shape == tuple(grouped(take(model)).shape)
        assert layer.trainable


@pytest.mark.parametrize("words", WORDS)
def test_the_gradient_of_what_the_user_says(words):
    neurons, expected = WORDS[words]
    model = Bare()
    twin = copy.deepcopy(model).double()
    settings = {"head": None, "neurons": neurons, "step_limit": None}
    regularizer = UniformityRegularizer(HALF_SPACE, 1.0, **settings).attach(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    regularizer.add_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    penalty = 0.0
    for take in expected.values():
        x = grouped(take(twin))
        penalty = penalty + sum(double_loop(group, True) for group in x) / len(x)
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(penalty, list(twin.parameters()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            error = (parameters[name].grad.double() - gradient).abs().max()
            assert error <= EXACT * gradient.abs().max()


UP = nn.ConvTranspose1d


def up_rows(m):
    """Kernels (in, out / groups, k) by output."""
    by_group = m.weight.view(m.groups, -1, *m.weight.shape[1:])
    return by_group.transpose(1, 2).flatten(2)


def up_columns(m):
    """The same by input."""
    return m.weight.view(m.groups, -1, *m.weight.shape[1:]).flatten(2)


CONVOLUTIONS = [
    pytest.param(lambda: nn.Conv2d(3, 4, 2), "rows", {"0": lambda m: flat(m.weight)}, id="rows"),
    pytest.param(
        lambda: nn.Conv2d(3, 4, 2),
        "columns",
        {"0": lambda m: m.weight.transpose(0, 1).flatten(1)},
        id="columns",
    ),
    pytest.param(
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        "rows",
        {"0": lambda m: m.weight.reshape(2, 2, 27)},
        id="rows, grouped",
    ),
    pytest.param(
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        "columns",
        {"0": lambda m: m.weight.view(2, 2, 3, 3, 3).transpose(1, 2).flatten(2)},
        id="columns, grouped",
    ),
    pytest.param(
        lambda: nn.Conv1d(3, 4, 2),
        2,
        {"0.0": lambda m: flat(m.weight)[:2], "0.1": lambda m: flat(m.weight)[2:]},
        id="parts",
    ),
    pytest.param(lambda: UP(3, 4, 2), "rows", {"0": up_rows}, id="transposed rows"),
    pytest.param(lambda: UP(6, 4, 3, groups=2), "rows", {"0": up_rows}, id="transposed, grouped"),
    pytest.param(lambda: UP(3, 4, 2), "columns", {"0": up_columns}, id="its columns"),
    pytest.param(
        lambda: UP(6, 4, 3, groups=2),
        "columns",
        {"0": up_columns},
        id="its columns, grouped",
    ),
    pytest.param(
        lambda: UP(6, 4, 3),
        2,
        {"0.0": lambda m: up_rows(m)[:, :2], "0.1": lambda m: up_rows(m)[:, 2:]},
        id="its parts",
    ),
]


@pytest.mark.parametrize(("make", "how", "expected"), CONVOLUTIONS)
def test_rows_and_columns_of(make, how, expected):
    model = nn.Sequential(make())
    regularizer = UniformityRegularizer(head=None, neurons={"0": how}).attach(model)
    found = {layer.name: layer.target.neurons() for layer in regularizer.layers}
    assert set(found) == set(expected)
    for name, take in expected.items():
        assert torch.equal(found[name], grouped(take(model[0])))


@pytest.mark.parametrize(
    "how",
    [
        "rows",
        "columns",
        1,
        2,
    ],
)
def test_the_row_of_a_padding_never_trains(how):
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0] = 0.1  # as after loading weights; a row of zeros has no direction
    regularizer = UniformityRegularizer(head=None, neurons={"0": how}).attach(model)
    model[0].weight.grad = torch.zeros(7, 4)
    regularizer.add_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    assert (model[0].weight.grad[1:] != 0).any()
    assert (model[0].weight.grad[0] == 0).all()


LAYERS = {
    "packed attention": (
        lambda: nn.MultiheadAttention(6, 2),
        {"in_proj_weight": 3},
        {f"in_proj_weight.{i}": lambda m, i=i: m.in_proj_weight.chunk(3)[i] for i in range(3)}
        | {"out_proj": lambda m: m.out_proj.weight},
    ),
    "one weight of an LSTM": (
        lambda: nn.LSTM(5, 4),
        {"weight_ih_l0": "columns"},
        {"weight_ih_l0": lambda m: m.weight_ih_l0.T}
        | {
            f"weight_hh_l0.{gate}": lambda m, i=i: m.weight_hh_l0.chunk(4)[i]
            for i, gate in enumerate("ifgo")
        },
    ),
    "a fused projection as one set": (
        GatedMlp,
        {"gate_up_proj": "rows"},
        {
            "gate_up_proj": lambda m: m.gate_up_proj.weight,
            "down_proj": lambda m: m.down_proj.weight,
        },
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
        {"weight": "columns"},
        {"weight": lambda m: m.weight.T},
    ),
    "a dictionary that is none": (
        LinearAutoencoder,
        {"decoder": "rows"},
        {"encoder": lambda m: m.encoder.weight, "decoder": lambda m: m.decoder.weight},
    ),
    "square Conv1D of transformers by rows": (
        lambda: Conv1D(6, 6),
        {"weight": "rows"},
        {"weight": lambda m: m.weight},
    ),
    "buffer": (
        EuclideanCodebook,
        {"embed": "columns"},
        {"embed": lambda m: m.embed.T},
    ),
    "raw weight": (
        WeightDrop,
        {"module.weight_raw": "rows"},
        {"module.weight_raw": lambda m: m.module.weight_raw, "head": lambda m: m.head.weight},
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_user_knows_better_than_the_rule_for(case):
    make, neurons, expected = LAYERS[case]
    model = make()
    regularizer = UniformityRegularizer(head=None, neurons=neurons, coefficient=0).attach(model)
    found = {layer.name: layer.target.neurons() for layer in regularizer.layers}
    assert list(found) == list(expected)
    for name, take in expected.items():
        assert torch.equal(found[name], grouped(take(model)))


class Registered(nn.Module):
    """A layer of a class for which a rule is registered."""

    def __init__(self):
        super().__init__()
        self.kernel = weight(5, 7)


@pytest.fixture
def _registered():
    register_neurons(Registered, lambda module: module.kernel.T)
    yield
    del _RULES[Registered]


def first_inputs(w):
    return w.transpose(0, 1).flatten(1)


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize(
    ("make", "neurons", "expected"),
    [
        (lambda: nn.Bilinear(3, 2, 4), {"weight": first_inputs}, [("weight", (1, 3, 8))]),
        (Registered, {"kernel": "rows"}, [("kernel", (1, 5, 7))]),
        (TorchtuneLinear, {"weight": "rows"}, [("weight", (1, 16, 16))]),
    ],
    ids=["Bilinear", "registered class", "adapter"],
)
def test_a_weight_is_read_once_as_the_user_says(make, neurons, expected):
    regularizer = UniformityRegularizer(head=None, neurons=neurons, coefficient=0).attach(make())
    assert [(layer.name, layer.target.shape) for layer in regularizer.layers] == expected


class Factored(nn.Module):
    """Layers whose neurons are asked for beside others."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.matrix = weight(6, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["body", "head"]),
        ({"neurons": {"matrix": "rows"}}, ["matrix", "body", "head"]),
        ({"neurons": {"words": "rows"}, "include": "body"}, ["words", "body"]),
        ({"neurons": {"matrix": 2}, "include": "body"}, ["matrix.0", "matrix.1", "body"]),
        ({"neurons": {"matrix": "rows"}, "include": "body", "exclude": "matrix"}, ["body"]),
        ({"neurons": {"matrix": 2}, "exclude": ["matrix.1", "head"]}, ["matrix.0", "body"]),
        ({"neurons": {"body": "columns"}, "exclude": "body"}, ["head"]),
        ({"neurons": {"body": "rows"}, "include": "head"}, ["body", "head"]),
        ({"neurons": {"*": "rows"}, "exclude": "head"}, ["matrix", "words", "body"]),
    ],
)
def test_neurons_with_include_and_exclude(arguments, names):
    summary = summarize(Factored(), **arguments)
    assert [layer.name for layer in summary.layers] == names


def test_what_exclude_leaves_out_says_so():
    summary = summarize(Factored(), neurons={"matrix": 5}, exclude="matrix")  # 5 divides nothing
    assert "matrix" not in shapes_of(summary)
    summary = summarize(Factored(), neurons={"matrix": "rows"}, exclude="matrix")
    assert reasons_of(summary)["matrix"] == "excluded by pattern"


def gives_nothing(_):
    return None


def raises(_):
    raise KeyError("no such axis")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neurons": {"bodi": "rows"}}, r"neurons pattern 'bodi' matches no weight; did you mean"),
        ({"neurons": {"bodi": "rows"}}, r"did you mean 'body'\? The weights are: matrix, words, "),
        ({"neurons": {"body": 3}}, r"the 4 rows of layer 'body' \(4, 4\) do not divide into 3"),
        ({"neurons": {"matrix": 4}}, r"the 6 rows of layer 'matrix' \(6, 4\) do not divide into 4"),
        ({"neurons": {"body": 0}}, r"neurons\['body'\] must be at least 1 part; got 0"),
        ({"neurons": {"body": "row"}}, r"neurons\['body'\] must be 'rows', 'columns'.*got 'row'"),
        ({"neurons": {"body": True}}, r"neurons\['body'\] must be 'rows'.*got True"),
        ({"neurons": {"body": None}}, r"neurons\['body'\] must be 'rows'.*got None"),
        ({"neurons": {"body": 2.0}}, r"neurons\['body'\] must be 'rows'.*got 2.0"),
        ({"neurons": {3: "rows"}}, r"3 is no pattern"),
        ({"neurons": ["body"]}, r"neurons maps patterns of names to .*got \['body'\]"),
        ({"neurons": "body"}, r"neurons maps patterns of names to .*got 'body'"),
        ({"neurons": {"body": lambda w: w[0]}}, r"for layer 'body' \(4, 4\) gave shape \(4,\)"),
        ({"neurons": {"body": lambda w: w[:0]}}, r"for layer 'body' \(4, 4\) gave shape \(0, 4\)"),
        ({"neurons": {"body": raises}}, r"for layer 'body' \(4, 4\) failed: .*no such axis"),
        ({"neurons": {"body": gives_nothing}}, r"for layer 'body' \(4, 4\) gave NoneType"),
        ({"neurons": {"body": lambda w: w.detach()}}, r"'body' \(4, 4\) gave detached neurons"),
        ({"neurons": {"body.bias": "rows"}}, r"'body.bias' matches no weight; did you mean 'body'"),
        ({"head": ["head", "haed"]}, r"head 'haed' is no layer of the model; did you mean 'head'"),
        ({"head": 5}, r"head takes 'auto', a layer's name, a list of names or None; got 5"),
    ],
)
def test_errors_say_what_and_where(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        summarize(Factored(), **arguments)
    with pytest.raises((ValueError, TypeError), match=message):
        UniformityRegularizer(**arguments).attach(Factored())


def test_an_error_of_a_layer_that_is_left_out_is_none():
    summary = summarize(Factored(), neurons={"body": lambda w: w[0]}, exclude="body")
    assert [layer.name for layer in summary.layers] == ["head"]


def test_several_heads_by_name():
    summary = summarize(Factored(), head=["body", "head"])
    assert heads_of(summary) == {"body", "head"}
    assert {layer.head_reason for layer in summary.layers} == {"named"}


# What looking does to a model.


def state_of(model):
    flags = [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
    ]
    hooks = [len(m._backward_hooks) + len(m._state_dict_hooks) for m in model.modules()]
    names = [sorted(vars(m)) for m in model.modules()]
    parameters = [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]
    grads = [p.grad is None for p in model.parameters()]
    return flags, hooks, names, parameters, grads


def test_a_summary_changes_nothing(structure):
    model = structure.build()
    model.eval()
    list(model.modules())[-1].train()
    next(iter(model.parameters())).requires_grad_(False)
    before = state_of(model)
    values = copy.deepcopy(model.state_dict())
    seed = torch.get_rng_state()
    first = summarize(model)
    again = summarize(model)
    assert torch.equal(torch.get_rng_state(), seed)
    assert state_of(model) == before
    for name, x in model.state_dict().items():
        assert torch.equal(x, values[name])
    assert shapes_of(first) == shapes_of(again)
    assert str(first) == str(again)


def computed():
    """Weights that each access, or each forward pass in training, computes anew."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)),
        parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        nn.utils.prune.random_unstructured(nn.Linear(8, 5), "weight", 0.5),
    )


def test_a_summary_changes_no_computed_weights():
    model = computed()
    values = copy.deepcopy(model.state_dict())
    before = state_of(model)
    seed = torch.get_rng_state()
    assert set(shapes_of(summarize(model))) == {"0", "1", "4"}
    assert torch.equal(torch.get_rng_state(), seed)
    assert state_of(model) == before
    for name, x in model.state_dict().items():
        assert torch.equal(x, values[name])


def test_there_is_a_summary_while_a_model_is_attached():
    model = mlp(6, 8, 5)
    regularizer = UniformityRegularizer()
    assert regularizer.summary is None
    regularizer.attach(model)
    assert shapes_of(regularizer.summary) == {"0": (1, 8, 6), "2": (1, 5, 8)}
    regularizer.detach()
    assert regularizer.summary is None
    assert len(model._forward_hooks) == 0


# How much is measured.


def tied():
    model = Factored()
    model.out = nn.Linear(4, 9, bias=False)
    model.out.weight = model.words.weight
    return model


ALL = 6 * 4 + 9 * 4 + 4 * 4 + 3 * 4  # of Factored
COVERAGES = {
    "embedding": (Factored, {}, (16 + 12) / ALL),
    "embedding, asked for": (Factored, {"neurons": {"words": "rows"}}, (16 + 12 + 36) / ALL),
    "parameter, asked for": (Factored, {"neurons": {"matrix": "rows"}}, (16 + 12 + 24) / ALL),
    "one of two parts": (
        Factored,
        {"neurons": {"matrix": 2}, "exclude": "matrix.1"},
        (16 + 12 + 12) / ALL,
    ),
    "a few rows": (Factored, {"neurons": {"matrix": lambda w: w[:2]}}, (16 + 12 + 8) / ALL),
    "everything": (Factored, {"neurons": {"*": "rows"}}, 1.0),
    "padding": (
        lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 3)),
        {"neurons": {"0": "rows"}},
        (8 * 4 + 12) / (9 * 4 + 12),
    ),
    "tied": (tied, {}, (16 + 12 + 36) / ALL),
    "tied, asked for": (tied, {"neurons": {"words": "rows"}}, (16 + 12 + 36) / ALL),
    "LSTM": (lambda: nn.LSTM(5, 4), {}, 1.0),
    "LSTM, a part": (
        lambda: nn.LSTM(5, 4),
        {"include": "weight_ih_l0"},
        (16 * 5) / (16 * 5 + 16 * 4),
    ),
    "LSTM, two gates": (
        lambda: nn.LSTM(5, 4),
        {"include": ["*.i", "*.f"]},
        0.5,
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Embedding(9, 4)),
        {},
        (4 + 20) / (4 + 20 + 36),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 1)),
        {},
        24 / (18 + 24),
    ),
    "fused": (lambda: before_a_head(TimmAttention()), {"exclude": "0.qkv.k"}, 232 / 296),
    "experts": (lambda: Mixture(GptOssExperts()), {}, (12 + 120 + 60 + 28) / (220 + 30)),
    "codebook in a buffer": (VectorQuantizer, {}, 1.0),
}


@pytest.mark.parametrize("case", COVERAGES)
def test_the_coverage_of(case):
    make, arguments, expected = COVERAGES[case]
    assert summarize(make(), **arguments).coverage == pytest.approx(expected, abs=1e-9)


def test_no_weights_have_no_coverage():
    assert math.isnan(summarize(nn.LayerNorm(4)).coverage)
