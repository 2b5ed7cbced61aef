"""Real networks for graphs, series, molecules, dictionaries, codes and metric learning.

Each entry says what somebody who has read the model's source would measure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.real_models.base import RealModel

NODES = 12
EDGES = torch.tensor(
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 3, 6, 9],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 6, 9, 0, 3],
    ]
)
RELATIONS = torch.arange(16) % 5
METADATA = (
    ["paper", "author"],
    [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "by", "author")],
)


def _rows_of(weight: Tensor) -> Tensor:
    """A weight (out, in): a neuron is one output unit."""
    return weight.flatten(1)


def _rows(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    """Rows of a weight that several layers share."""
    return lambda weight: weight[start:stop].flatten(1)


def _columns(weight: Tensor) -> Tensor:
    """A weight (in, out), as in x @ weight; or a stack of them, one group a matrix."""
    return weight.transpose(-2, -1)


def _as_stored(weight: Tensor) -> Tensor:
    """A stack of matrices with a neuron a row."""
    return weight


def _columns_of_blocks(weight: Tensor) -> Tensor:
    """Stacks (relations, blocks, in, out) of matrices, one group a block."""
    return weight.flatten(0, 1).transpose(1, 2)


def _features(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(shape)


# torch_geometric


def _graph_network(name: str, layers: int = 2, **options: Any) -> Callable[[], nn.Module]:
    """One of torch_geometric's ready networks: 16 features, 32 hidden ones, 7 classes."""

    def build() -> nn.Module:
        import torch_geometric.nn

        torch.manual_seed(0)
        network: nn.Module = getattr(torch_geometric.nn, name)(16, 32, layers, 7, **options)
        return network

    return build


def _node_loss(model: nn.Module) -> Tensor:
    """The cross-entropy of each node's class."""
    logits = model(_features(NODES, 16), EDGES)
    return functional.cross_entropy(logits, torch.arange(NODES) % 7)


class RelationalNetwork(nn.Module):
    """Weights by relation: whole ones, blocks on the diagonal, whole ones."""

    def __init__(self) -> None:
        from torch_geometric.nn import RGCNConv

        super().__init__()
        self.conv1 = RGCNConv(16, 32, 5)
        self.conv2 = RGCNConv(32, 16, 5, num_blocks=4)
        self.conv3 = RGCNConv(16, 7, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.conv1(x, edge_index, RELATIONS).relu()
        x = self.conv2(x, edge_index, RELATIONS).relu()
        logits: Tensor = self.conv3(x, edge_index, RELATIONS)
        return logits


def _rgcn() -> nn.Module:
    torch.manual_seed(0)
    return RelationalNetwork()


class HeterogeneousTransformer(nn.Module):
    """The example of torch_geometric: a Linear a node type, HGTConv, a classifier."""

    def __init__(self) -> None:
        from torch_geometric.nn import HeteroDictLinear, HGTConv

        super().__init__()
        self.embed = HeteroDictLinear({"paper": 16, "author": 8}, 32)
        self.conv = HGTConv(32, 32, METADATA, heads=4)
        self.lin = nn.Linear(32, 7)

    def forward(self, x: dict[str, Tensor], edge_index: dict[Any, Tensor]) -> Tensor:
        hidden = {kind: part.relu() for kind, part in self.embed(x).items()}
        hidden = self.conv(hidden, edge_index)
        logits: Tensor = self.lin(torch.cat([hidden["paper"], hidden["author"]]))
        return logits


def _hgt() -> nn.Module:
    torch.manual_seed(0)
    return HeterogeneousTransformer()


def _hgt_loss(model: nn.Module) -> Tensor:
    x = {"paper": _features(NODES, 16), "author": torch.randn(NODES, 8)}
    edge_index = dict.fromkeys(METADATA[1], EDGES)
    logits = model(x, edge_index)
    return functional.cross_entropy(logits, torch.arange(2 * NODES) % 7)


class GraphTransformer(nn.Module):
    """Attention over neighbours, with features of the edges."""

    def __init__(self) -> None:
        from torch_geometric.nn import TransformerConv

        super().__init__()
        self.conv1 = TransformerConv(16, 8, heads=4, edge_dim=6)
        self.conv2 = TransformerConv(32, 8, heads=4, edge_dim=6, beta=True)
        self.classifier = nn.Linear(32, 7)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        edges = torch.linspace(-1, 1, 16 * 6).view(16, 6)
        x = self.conv1(x, edge_index, edges).relu()
        x = self.conv2(x, edge_index, edges).relu()
        logits: Tensor = self.classifier(x)
        return logits


def _graph_transformer() -> nn.Module:
    torch.manual_seed(0)
    return GraphTransformer()


class TypedNetwork(nn.Module):
    """Layers with a weight for each type of node."""

    def __init__(self) -> None:
        from torch_geometric.nn import HeteroLinear

        super().__init__()
        self.first = HeteroLinear(16, 32, 3)
        self.second = HeteroLinear(32, 24, 3)
        self.output = HeteroLinear(24, 7, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        types = torch.arange(NODES) % 3
        x = self.first(x, types).relu()
        x = self.second(x, types).relu()
        logits: Tensor = self.output(x, types)
        return logits


def _hetero_linear() -> nn.Module:
    torch.manual_seed(0)
    return TypedNetwork()


class GatedNetwork(nn.Module):
    """A gated graph network: a weight (in, out) a step, and a GRU cell."""

    def __init__(self) -> None:
        from torch_geometric.nn import GatedGraphConv

        super().__init__()
        self.conv = GatedGraphConv(24, num_layers=3)
        self.lin = nn.Linear(24, 7)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        logits: Tensor = self.lin(self.conv(x, edge_index).relu())
        return logits


def _gated_graph() -> nn.Module:
    torch.manual_seed(0)
    return GatedNetwork()


class DeepNetwork(nn.Module):
    """Two of GCNII's layers, whose weights are (in, out)."""

    def __init__(self) -> None:
        from torch_geometric.nn import GCN2Conv

        super().__init__()
        self.embed = nn.Linear(16, 32)
        self.conv1 = GCN2Conv(32, alpha=0.1, theta=0.5, layer=1)
        self.conv2 = GCN2Conv(32, alpha=0.1, theta=0.5, layer=2, shared_weights=False)
        self.lin = nn.Linear(32, 7)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        first = self.embed(x).relu()
        x = self.conv1(first, first, edge_index).relu()
        x = self.conv2(x, first, edge_index).relu()
        logits: Tensor = self.lin(x)
        return logits


def _gcn2() -> nn.Module:
    torch.manual_seed(0)
    return DeepNetwork()


GRAPHS = (
    RealModel(
        name="torch_geometric: GCN",
        imports=("torch_geometric",),
        build=_graph_network("GCN", layers=3),
        loss=_node_loss,
        heads=("convs.2.lin",),
        shapes={"convs.0.lin": (1, 32, 16), "convs.2.lin": (1, 7, 32)},
        reads={
            "convs.0.lin": ("convs.0.lin.weight", _rows_of),
            "convs.1.lin": ("convs.1.lin.weight", _rows_of),
            "convs.2.lin": ("convs.2.lin.weight", _rows_of),
        },
    ),
    RealModel(
        name="torch_geometric: GAT",
        imports=("torch_geometric",),
        build=_graph_network("GAT", layers=3, heads=4),
        loss=_node_loss,
        heads=("convs.2.lin",),
        shapes={"convs.0.lin": (1, 32, 16), "convs.2.lin": (1, 28, 32)},
        reads={
            "convs.0.lin": ("convs.0.lin.weight", _rows_of),
            "convs.1.lin": ("convs.1.lin.weight", _rows_of),
            "convs.2.lin": ("convs.2.lin.weight", _rows_of),
        },
        # One vector for each attention head, which sees that head's features only.
        rest={"convs.*.att_src": "attention vectors", "convs.*.att_dst": "attention vectors"},
    ),
    RealModel(
        name="torch_geometric: GraphSAGE",
        imports=("torch_geometric",),
        build=_graph_network("GraphSAGE"),
        loss=_node_loss,
        heads=("convs.1.lin_l", "convs.1.lin_r"),
        shapes={"convs.0.lin_l": (1, 32, 16), "convs.0.lin_r": (1, 32, 16)},
        reads={
            "convs.0.lin_l": ("convs.0.lin_l.weight", _rows_of),
            "convs.0.lin_r": ("convs.0.lin_r.weight", _rows_of),
            "convs.1.lin_l": ("convs.1.lin_l.weight", _rows_of),
        },
    ),
    RealModel(
        name="torch_geometric: GIN",
        imports=("torch_geometric",),
        build=_graph_network("GIN"),
        loss=_node_loss,
        heads=("convs.1.nn.lins.1",),
        shapes={"convs.0.nn.lins.0": (1, 32, 16), "convs.1.nn.lins.1": (1, 7, 7)},
        reads={
            "convs.0.nn.lins.0": ("convs.0.nn.lins.0.weight", _rows_of),
            "convs.0.nn.lins.1": ("convs.0.nn.lins.1.weight", _rows_of),
            "convs.1.nn.lins.1": ("convs.1.nn.lins.1.weight", _rows_of),
        },
    ),
    RealModel(
        name="torch_geometric: PNA",
        imports=("torch_geometric",),
        build=_graph_network(
            "PNA",
            aggregators=["mean", "max"],
            scalers=["identity", "amplification"],
            deg=torch.tensor([0, 8, 4]),
        ),
        loss=_node_loss,
        heads=("convs.1.lin",),
        shapes={
            "convs.0.pre_nns.0.0": (1, 16, 32),
            "convs.0.post_nns.0.0": (1, 32, 80),
            "convs.1.lin": (1, 7, 7),
        },
        reads={
            "convs.0.pre_nns.0.0": ("convs.0.pre_nns.0.0.weight", _rows_of),
            "convs.0.post_nns.0.0": ("convs.0.post_nns.0.0.weight", _rows_of),
            "convs.1.lin": ("convs.1.lin.weight", _rows_of),
        },
    ),
    RealModel(
        name="torch_geometric: RGCN",
        imports=("torch_geometric",),
        build=_rgcn,
        loss=_node_loss,
        heads=("conv3", "conv3.root"),
        shapes={
            "conv1": (5, 32, 16),
            "conv1.root": (1, 32, 16),
            "conv2": (20, 4, 8),
            "conv2.root": (1, 16, 32),
            "conv3": (5, 7, 16),
            "conv3.root": (1, 7, 16),
        },
        reads={
            "conv1": ("conv1.weight", _columns),
            "conv1.root": ("conv1.root", _columns),
            "conv2": ("conv2.weight", _columns_of_blocks),
        },
    ),
    RealModel(
        name="torch_geometric: HGT",
        imports=("torch_geometric",),
        build=_hgt,
        loss=_hgt_loss,
        heads=("lin",),
        # Stored in the order k, q, v. k_rel and v_rel: one matrix (in, out) a head and relation.
        shapes={
            "embed.lins.paper": (1, 32, 16),
            "conv.kqv_lin.lins.paper.k": (1, 32, 32),
            "conv.kqv_lin.lins.paper.q": (1, 32, 32),
            "conv.kqv_lin.lins.paper.v": (1, 32, 32),
            "conv.out_lin.lins.paper": (1, 32, 32),
            "conv.k_rel": (12, 8, 8),
            "conv.v_rel": (12, 8, 8),
        },
        reads={
            "conv.kqv_lin.lins.paper.k": ("conv.kqv_lin.lins.paper.weight", _rows(0, 32)),
            "conv.kqv_lin.lins.author.q": ("conv.kqv_lin.lins.author.weight", _rows(32, 64)),
            "conv.k_rel": ("conv.k_rel.weight", _columns),
        },
    ),
    RealModel(
        name="torch_geometric: TransformerConv",
        imports=("torch_geometric",),
        build=_graph_transformer,
        loss=_node_loss,
        heads=("classifier",),
        shapes={
            "conv1.lin_query": (1, 32, 16),
            "conv1.lin_edge": (1, 32, 6),
            "classifier": (1, 7, 32),
        },
        reads={
            "conv1.lin_query": ("conv1.lin_query.weight", _rows_of),
            "conv1.lin_edge": ("conv1.lin_edge.weight", _rows_of),
            "conv2.lin_skip": ("conv2.lin_skip.weight", _rows_of),
        },
    ),
    RealModel(
        name="torch_geometric: HeteroLinear",
        imports=("torch_geometric",),
        build=_hetero_linear,
        loss=_node_loss,
        heads=("output",),
        shapes={"first": (3, 32, 16), "second": (3, 24, 32), "output": (3, 7, 24)},
        reads={
            "first": ("first.weight", _columns),
            "second": ("second.weight", _columns),
            "output": ("output.weight", _columns),
        },
        rest={"*.bias": "bias"},
    ),
    RealModel(
        name="torch_geometric: GatedGraphConv",
        imports=("torch_geometric",),
        build=_gated_graph,
        loss=_node_loss,
        heads=("lin",),
        shapes={
            "conv": (3, 24, 24),
            "conv.rnn.weight_ih.r": (1, 24, 24),
            "conv.rnn.weight_ih.z": (1, 24, 24),
            "conv.rnn.weight_hh.n": (1, 24, 24),
        },
        reads={
            "conv": ("conv.weight", _columns),
            "conv.rnn.weight_ih.z": ("conv.rnn.weight_ih", _rows(24, 48)),
            "conv.rnn.weight_hh.n": ("conv.rnn.weight_hh", _rows(48, 72)),
        },
    ),
    RealModel(
        name="torch_geometric: GCN2",
        imports=("torch_geometric",),
        build=_gcn2,
        loss=_node_loss,
        heads=("lin",),
        shapes={
            "conv1.weight1": (1, 32, 32),
            "conv2.weight1": (1, 32, 32),
            "conv2.weight2": (1, 32, 32),
        },
        reads={
            "conv1.weight1": ("conv1.weight1", _columns),
            "conv2.weight1": ("conv2.weight1", _columns),
            "conv2.weight2": ("conv2.weight2", _columns),
        },
    ),
)


# e3nn


def _radial() -> nn.Module:
    from e3nn.nn import FullyConnectedNet

    torch.manual_seed(0)
    return FullyConnectedNet([8, 32, 24, 5], functional.silu)


def _radial_loss(model: nn.Module) -> Tensor:
    y: Tensor = model(_features(16, 8))
    return y.square().mean()


E3NN = (
    RealModel(
        name="e3nn: FullyConnectedNet",
        imports=("e3nn",),
        build=_radial,
        loss=_radial_loss,
        heads=("layer2",),
        shapes={"layer0": (1, 32, 8), "layer1": (1, 24, 32), "layer2": (1, 5, 24)},
        reads={
            "layer0": ("layer0.weight", _columns),
            "layer1": ("layer1.weight", _columns),
            "layer2": ("layer2.weight", _columns),
        },
    ),
)


# Series: neuralforecast and darts


def _forecaster(name: str, input_size: int, **options: Any) -> Callable[[], nn.Module]:
    """A network of neuralforecast that forecasts six steps."""

    def build() -> nn.Module:
        import neuralforecast.models

        kind = getattr(neuralforecast.models, name)
        torch.manual_seed(0)
        network: nn.Module = kind(h=6, input_size=input_size, random_seed=0, **options)
        return network

    return build


def _forecast_loss(input_size: int) -> Callable[[nn.Module], Tensor]:
    def loss(model: nn.Module) -> Tensor:
        series = _features(8, input_size + 6, 1).cumsum(1)
        past = series[:, :input_size]
        batch = {
            "insample_y": past,
            "insample_mask": torch.ones_like(past),
            "futr_exog": None,
            "hist_exog": None,
            "stat_exog": None,
        }
        return functional.l1_loss(model(batch), series[:, input_size:])

    return loss


def _darts_lstm() -> nn.Module:
    from darts.models.forecasting.block_rnn_model import _BlockRNNModule

    torch.manual_seed(0)
    return _BlockRNNModule(
        name="LSTM",
        input_size=3,
        hidden_dim=16,
        future_cov_dim=0,
        num_layers=2,
        target_size=3,
        nr_params=1,
        num_layers_out_fc=[12],
        dropout=0.0,
        activation="ReLU",
        input_chunk_length=12,
        output_chunk_length=6,
    )


def _darts_tide() -> nn.Module:
    from darts.models.forecasting.tide_model import _TideModule

    torch.manual_seed(0)
    return _TideModule(
        input_dim=3,
        output_dim=3,
        future_cov_dim=0,
        static_cov_dim=0,
        nr_params=1,
        num_encoder_layers=1,
        num_decoder_layers=1,
        decoder_output_dim=8,
        hidden_size=32,
        temporal_decoder_hidden=16,
        temporal_width_past=4,
        temporal_width_future=4,
        use_layer_norm=False,
        dropout=0.0,
        input_chunk_length=12,
        output_chunk_length=6,
    )


def _darts_loss(model: nn.Module) -> Tensor:
    from darts.utils.data.torch_datasets.utils import PLModuleInput

    series = _features(8, 18, 3)
    output = model(PLModuleInput(past_target=series[:, :12]))
    return functional.mse_loss(output.prediction.squeeze(-1), series[:, 12:])


_ATTENTION = "model.backbone.encoder.layers.0.self_attn"

SERIES = (
    RealModel(
        name="neuralforecast: N-HiTS",
        imports=("neuralforecast",),
        build=_forecaster("NHITS", 12, mlp_units=[[32, 24], [24, 16]]),
        loss=_forecast_loss(12),
        # The forecast is the sum of what the three blocks say.
        heads=("blocks.0.layers.5", "blocks.1.layers.5", "blocks.2.layers.5"),
        shapes={
            "blocks.0.layers.0": (1, 32, 6),
            "blocks.0.layers.1": (1, 24, 32),
            "blocks.2.layers.5": (1, 18, 16),
        },
        reads={
            "blocks.0.layers.0": ("blocks.0.layers.0.weight", _rows_of),
            "blocks.1.layers.1": ("blocks.1.layers.1.weight", _rows_of),
            "blocks.2.layers.5": ("blocks.2.layers.5.weight", _rows_of),
        },
    ),
    RealModel(
        name="neuralforecast: KAN",
        imports=("neuralforecast",),
        build=_forecaster("KAN", 12, hidden_size=16, n_hidden_layers=2),
        loss=_forecast_loss(12),
        heads=("layers.2.base_weight", "layers.2.spline_weight"),
        # The weights of the splines are spline_weight times spline_scaler, entry by entry.
        shapes={
            "layers.0.base_weight": (1, 16, 12),
            "layers.0.spline_weight": (1, 16, 96),
            "layers.1.base_weight": (1, 16, 16),
            "layers.1.spline_weight": (1, 16, 128),
            "layers.2.base_weight": (1, 6, 16),
            "layers.2.spline_weight": (1, 6, 128),
        },
        reads={
            "layers.0.base_weight": ("layers.0.base_weight", _rows_of),
            "layers.1.base_weight": ("layers.1.base_weight", _rows_of),
            "layers.2.base_weight": ("layers.2.base_weight", _rows_of),
        },
        rest={"layers.*.spline_scaler": "factor"},
    ),
    RealModel(
        name="neuralforecast: PatchTST",
        imports=("neuralforecast",),
        build=_forecaster(
            "PatchTST",
            24,
            patch_len=8,
            stride=4,
            hidden_size=16,
            n_heads=2,
            linear_hidden_size=32,
            encoder_layers=1,
        ),
        loss=_forecast_loss(24),
        heads=("model.head.linear",),
        shapes={
            "model.backbone.W_P": (1, 16, 8),
            f"{_ATTENTION}.W_Q": (1, 16, 16),
            "model.head.linear": (1, 6, 96),
        },
        reads={
            "model.backbone.W_P": ("model.backbone.W_P.weight", _rows_of),
            f"{_ATTENTION}.W_Q": (f"{_ATTENTION}.W_Q.weight", _rows_of),
            "model.head.linear": ("model.head.linear.weight", _rows_of),
        },
        rest={"model.backbone.W_pos": "embedding"},
    ),
    RealModel(
        name="darts: BlockRNN, LSTM",
        imports=("darts",),
        build=_darts_lstm,
        loss=_darts_loss,
        heads=("fc.2",),
        shapes={
            "rnn.weight_ih_l0.i": (1, 16, 3),
            "rnn.weight_hh_l0.f": (1, 16, 16),
            "rnn.weight_ih_l1.g": (1, 16, 16),
            "rnn.weight_hh_l1.o": (1, 16, 16),
            "fc.2": (1, 3, 12),
        },
        reads={
            "rnn.weight_ih_l0.i": ("rnn.weight_ih_l0", _rows(0, 16)),
            "rnn.weight_hh_l1.o": ("rnn.weight_hh_l1", _rows(48, 64)),
            "fc.0": ("fc.0.weight", _rows_of),
        },
    ),
    RealModel(
        name="darts: TiDE",
        imports=("darts",),
        build=_darts_tide,
        loss=_darts_loss,
        # The forecast is the sum of three layers: the last block's two paths, and the long skip.
        heads=("temporal_decoder.dense.2", "temporal_decoder.skip", "lookback_skip"),
        shapes={
            "encoders.0.dense.0": (1, 32, 36),
            "encoders.0.skip": (1, 32, 36),
            "temporal_decoder.dense.2": (1, 3, 16),
            "lookback_skip": (1, 6, 12),
        },
        reads={
            "encoders.0.dense.0": ("encoders.0.dense.0.weight", _rows_of),
            "decoders.0.skip": ("decoders.0.skip.weight", _rows_of),
            "lookback_skip": ("lookback_skip.weight", _rows_of),
        },
    ),
)


# chemprop


def _chemprop() -> nn.Module:
    from chemprop.models import MPNN
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    torch.manual_seed(0)
    predictor = RegressionFFN(n_tasks=3, input_dim=32, hidden_dim=24)
    return MPNN(BondMessagePassing(d_h=32), MeanAggregation(), predictor)


def _chemprop_loss(model: nn.Module) -> Tensor:
    from chemprop.data import BatchMolGraph
    from chemprop.featurizers import SimpleMoleculeMolGraphFeaturizer
    from rdkit import Chem

    featurize = SimpleMoleculeMolGraphFeaturizer()
    molecules = []
    for smiles in ("CCO", "c1ccccc1O", "CC(=O)N"):
        molecules.append(featurize(Chem.MolFromSmiles(smiles)))
    y: Tensor = model(BatchMolGraph(molecules))
    return (y - 1).square().mean()


CHEMPROP = (
    RealModel(
        name="chemprop: MPNN",
        imports=("chemprop", "rdkit"),
        build=_chemprop,
        loss=_chemprop_loss,
        heads=("predictor.ffn.1.2",),
        shapes={
            "message_passing.W_i": (1, 32, 86),
            "message_passing.W_o": (1, 32, 104),
            "predictor.ffn.1.2": (1, 3, 24),
        },
        reads={
            "message_passing.W_i": ("message_passing.W_i.weight", _rows_of),
            "message_passing.W_h": ("message_passing.W_h.weight", _rows_of),
            "predictor.ffn.1.2": ("predictor.ffn.1.2.weight", _rows_of),
        },
    ),
)


# Sparse autoencoders: the atoms of a dictionary


def _topk_sae() -> nn.Module:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    return TopKTrainingSAE(TopKTrainingSAEConfig(d_in=16, d_sae=64, k=4))


def _standard_sae() -> nn.Module:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    torch.manual_seed(0)
    return StandardTrainingSAE(StandardTrainingSAEConfig(d_in=16, d_sae=64))


def _sae_loss(model: nn.Module) -> Tensor:
    from sae_lens.saes.sae import TrainStepInput

    step = TrainStepInput(
        sae_in=_features(32, 16),
        coefficients={"l1": 0.1},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    loss: Tensor = model.training_forward_pass(step).loss
    return loss


class Dictionary(nn.Module):
    """The autoencoder of the package dictionary_learning: an atom is a column of the decoder."""

    def __init__(self, dimension: int, features: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dimension))
        self.encoder = nn.Linear(dimension, features)
        self.decoder = nn.Linear(features, dimension, bias=False)
        with torch.no_grad():
            atoms = functional.normalize(self.decoder.weight, dim=0)
            self.decoder.weight.copy_(atoms)
            self.encoder.weight.copy_(atoms.T)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = self.encoder(x - self.bias).relu()
        return self.decoder(codes) + self.bias, codes


def _dictionary() -> nn.Module:
    torch.manual_seed(0)
    return Dictionary(64, 512)


def _dictionary_loss(model: nn.Module) -> Tensor:
    x = _features(32, 64)
    y, codes = model(x)
    return functional.mse_loss(y, x) + 1e-3 * codes.norm(p=1, dim=-1).mean()


DICTIONARIES = (
    RealModel(
        name="sae_lens: TopK",
        imports=("sae_lens",),
        build=_topk_sae,
        loss=_sae_loss,
        heads=("W_dec",),
        shapes={"W_enc": (1, 64, 16), "W_dec": (1, 64, 16)},
        reads={"W_enc": ("W_enc", _columns), "W_dec": ("W_dec", _rows_of)},
    ),
    RealModel(
        name="sae_lens: Standard",
        imports=("sae_lens",),
        build=_standard_sae,
        loss=_sae_loss,
        heads=("W_dec",),
        shapes={"W_enc": (1, 64, 16), "W_dec": (1, 64, 16)},
        reads={"W_enc": ("W_enc", _columns), "W_dec": ("W_dec", _rows_of)},
    ),
    RealModel(
        name="plain torch: the autoencoder of dictionary_learning",
        imports=("torch",),
        build=_dictionary,
        loss=_dictionary_loss,
        heads=("decoder",),
        shapes={"encoder": (1, 512, 64), "decoder": (1, 512, 64)},
        reads={
            "encoder": ("encoder.weight", _rows_of),
            "decoder": ("decoder.weight", _columns),
        },
    ),
)


# Codebooks


class Quantizer(nn.Module):
    """An autoencoder with a codebook in the middle."""

    def __init__(self, quantize: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
        self.quantize = quantize
        self.decoder = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, _, commitment = self.quantize(self.encoder(x))
        return self.decoder(codes), commitment


def _quantizer(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Of one of vector_quantize_pytorch's codebooks."""

    def build() -> nn.Module:
        import vector_quantize_pytorch

        torch.manual_seed(0)
        quantize = getattr(vector_quantize_pytorch, name)(dim=16, codebook_size=40, **options)
        return Quantizer(quantize)

    return build


def _quantizer_loss(model: nn.Module) -> Tensor:
    x = _features(8, 10, 32)
    y, commitment = model(x)
    loss: Tensor = functional.mse_loss(y, x) + commitment.sum()
    return loss


CODEBOOKS = (
    RealModel(
        name="vector_quantize_pytorch: VectorQuantize",
        imports=("vector_quantize_pytorch",),
        build=_quantizer("VectorQuantize"),
        loss=_quantizer_loss,
        heads=("decoder.2",),
        # The codebook is a buffer, a running mean of what falls to each code.
        shapes={"quantize._codebook.embed": (1, 40, 16), "decoder.2": (1, 32, 24)},
        reads={
            "encoder.0": ("encoder.0.weight", _rows_of),
            "encoder.2": ("encoder.2.weight", _rows_of),
            "decoder.2": ("decoder.2.weight", _rows_of),
        },
    ),
    RealModel(
        name="vector_quantize_pytorch: VectorQuantize with two learned codebooks",
        imports=("vector_quantize_pytorch",),
        build=_quantizer(
            "VectorQuantize",
            codebook_dim=6,
            heads=2,
            separate_codebook_per_head=True,
            learnable_codebook=True,
            ema_update=False,
        ),
        loss=_quantizer_loss,
        heads=("decoder.2",),
        shapes={
            "quantize._codebook.embed": (2, 40, 6),
            "quantize.project_in": (1, 12, 16),
            "quantize.project_out": (1, 16, 12),
        },
        reads={
            "quantize._codebook.embed": ("quantize._codebook.embed", _as_stored),
            "quantize.project_in": ("quantize.project_in.weight", _rows_of),
            "quantize.project_out": ("quantize.project_out.weight", _rows_of),
        },
    ),
    RealModel(
        name="vector_quantize_pytorch: ResidualVQ",
        imports=("vector_quantize_pytorch",),
        build=_quantizer("ResidualVQ", num_quantizers=2),
        loss=_quantizer_loss,
        heads=("decoder.2",),
        shapes={
            "quantize.layers.0._codebook.embed": (1, 40, 16),
            "quantize.layers.1._codebook.embed": (1, 40, 16),
        },
        reads={
            "encoder.0": ("encoder.0.weight", _rows_of),
            "decoder.0": ("decoder.0.weight", _rows_of),
            "decoder.2": ("decoder.2.weight", _rows_of),
        },
    ),
)


# pytorch_metric_learning


class MetricLearner(nn.Module):
    """A trunk, and a loss that holds one direction a class."""

    def __init__(self, loss_function: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16))
        self.loss_function = loss_function

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss_function(self.trunk(x), labels)
        return loss


def _metric_learner(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from pytorch_metric_learning import losses

        torch.manual_seed(0)
        return MetricLearner(getattr(losses, name)(num_classes=10, embedding_size=16))

    return build


def _metric_loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(_features(20, 32), torch.arange(20) % 10)
    return loss


METRIC_LEARNING = (
    RealModel(
        name="pytorch_metric_learning: ProxyAnchorLoss",
        imports=("pytorch_metric_learning",),
        build=_metric_learner("ProxyAnchorLoss"),
        loss=_metric_loss,
        heads=("loss_function.proxies",),
        shapes={"loss_function.proxies": (1, 10, 16), "trunk.2": (1, 16, 48)},
        reads={
            "loss_function.proxies": ("loss_function.proxies", _rows_of),
            "trunk.0": ("trunk.0.weight", _rows_of),
            "trunk.2": ("trunk.2.weight", _rows_of),
        },
    ),
    RealModel(
        name="pytorch_metric_learning: ArcFaceLoss",
        imports=("pytorch_metric_learning",),
        build=_metric_learner("ArcFaceLoss"),
        loss=_metric_loss,
        heads=("loss_function.W",),
        # W is (dimension, classes).
        shapes={"loss_function.W": (1, 10, 16), "trunk.2": (1, 16, 48)},
        reads={
            "loss_function.W": ("loss_function.W", _columns),
            "trunk.0": ("trunk.0.weight", _rows_of),
            "trunk.2": ("trunk.2.weight", _rows_of),
        },
    ),
)


MODELS = GRAPHS + E3NN + SERIES + CHEMPROP + DICTIONARIES + CODEBOOKS + METRIC_LEARNING
