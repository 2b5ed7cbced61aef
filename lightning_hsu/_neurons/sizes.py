"""Weights of other libraries' layers, whose own sizes say which axis holds the neurons."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.quantised import qualified

_OUTPUTS_AND_INPUTS = (
    ("out_features", "in_features"),
    ("out_channels", "in_channels"),
    ("out_dim", "in_dim"),
    ("output_dim", "input_dim"),
    ("output_size", "input_size"),
    ("dim_out", "dim_in"),
    ("out_feats", "in_feats"),
    ("d_out", "d_in"),
    ("n_out", "n_in"),
    ("nf", "nx"),  # transformers' Conv1D
    ("h_out", "h_in"),  # e3nn
    ("num_classes", "embedding_size"),
    ("num_classes", "feat_dim"),
    ("num_classes", "in_features"),
    ("num_experts", "hidden_dim"),  # routers
    ("num_experts", "hidden_size"),
    ("num_experts", "input_size"),
    ("num_experts", "dim"),
    ("num_local_experts", "hidden_size"),
    ("n_routed_experts", "hidden_size"),
)
"""Attributes in which layers keep their numbers of outputs and inputs."""

_BY_COLUMNS = ("transformers.pytorch_utils.Conv1D", "e3nn.nn.", "torch_geometric.nn.")
"""Classes, or libraries, that multiply by an (in, out) matrix where a square one does not tell."""

_BY_ROWS = ("torch_geometric.nn.dense.linear.Linear",)

_FACTORS = (
    "scale",
    "scaler",
    "shift",
    "translation",
    "mask",
    "grid",
    "mean",
    "std",
    "var",
)  # by entry, not by direction

_NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("hidden_dim", "hidden_size", "input_size", "d_model", "dim")
_LEAVING = ("down", "w2", "output")  # in the names of the matrices back to the layer's width


def rule_by_sizes(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read a weight whose module keeps its numbers of outputs and inputs.

    Args:
        module: The module.
        attribute: Name of the weight in it.
        weight: The weight, (out, in), (in, out), (out, in, *kernel), or a stack of matrices.

    Returns:
        The rule, or None if no sizes of the module fit the weight.
    """
    for special in (
        _rule_of_experts,
        _rule_of_packed_experts,
        _rule_of_routers,
        _rule_of_graph_layers,
        _rule_of_convolutions,
    ):
        rule = special(module, attribute, weight)
        if rule is not None:
            return rule
    for outputs_name, inputs_name in _OUTPUTS_AND_INPUTS:
        if outputs_name in _NUMBERS_OF_EXPERTS and weight.ndim != 2:
            continue  # a stack whose axes do not tell, not a router
        all_outputs = _sizes(module, outputs_name)
        all_inputs = _sizes(module, inputs_name)
        for outputs in all_outputs:
            for inputs in all_inputs:
                rule = _fitting(module, attribute, weight, outputs, inputs)
                if rule is not None:
                    return rule
    return None


def is_factor(attribute: str) -> bool:
    """Whether a parameter multiplies or shifts entry by entry, as its name says."""
    last = attribute.lower().rpartition("_")[2]
    return last in _FACTORS or attribute in ("scale_shift_table", "A_log")


def whole_number(module: nn.Module, name: str) -> int | None:
    """A module's attribute if it is a whole number above zero, else None."""
    value = module.__dict__.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        return None
    return value


def _sizes(module: nn.Module, name: str) -> list[int]:
    """A size that a module keeps, or several if it keeps a tuple."""
    value = module.__dict__.get(name)
    values = value if isinstance(value, (tuple, list)) else (value,)
    found = []
    for one in values:
        if isinstance(one, int) and not isinstance(one, bool) and one > 0:
            found.append(one)
    return found


def _fitting(
    module: nn.Module, attribute: str, weight: Tensor, outputs: int, inputs: int
) -> WeightRule | None:
    """How a weight holds this many outputs and inputs; None if it does not."""
    shape = tuple(weight.shape)
    if weight.ndim > 2 and shape[:2] == (outputs, inputs):
        return WeightRule(attribute, kernels=True)  # such as the splines of a KAN
    by_rows = shape[-2:] == (outputs, inputs)
    by_columns = shape[-2:] == (inputs, outputs)
    if by_rows and by_columns:
        return WeightRule(attribute, columns=_multiplies_from_the_right(module))
    if by_rows or by_columns:
        return WeightRule(attribute, columns=by_columns)
    return None


def _multiplies_from_the_right(module: nn.Module) -> bool:
    """Whether a class is known to store its weights (in, out)."""
    name = qualified(module)
    return name.startswith(_BY_COLUMNS) and name not in _BY_ROWS


def _rule_of_experts(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read a stack (experts, out, in) or (experts, in, out); None if it is none."""
    if weight.ndim != 3:
        return None
    counts = [whole_number(module, name) for name in _NUMBERS_OF_EXPERTS]
    if weight.shape[0] not in counts:
        return None
    transposed = module.__dict__.get("is_transposed")  # transformers 5
    if isinstance(transposed, bool):
        return WeightRule(attribute, columns=transposed)
    is_leaving = any(part in attribute.lower() for part in _LEAVING)
    for name in _WIDTHS:
        width = whole_number(module, name)
        first, last = weight.shape[1:]
        if width is None or first == last or width not in (first, last):
            continue
        outputs_last = (last == width) == is_leaving
        return WeightRule(attribute, columns=outputs_last)
    return None


def _rule_of_packed_experts(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read experts one below the other (experts * inner, width), as DBRX has them."""
    if weight.ndim != 2:
        return None
    rows, width = weight.shape
    if width not in [whole_number(module, name) for name in _WIDTHS]:
        return None
    for name in _NUMBERS_OF_EXPERTS:
        experts = whole_number(module, name)
        inner = whole_number(module, "ffn_hidden_size")
        if experts is not None and inner is not None and rows == experts * inner:
            is_leaving = any(part in attribute.lower() for part in _LEAVING)
            return WeightRule(attribute, columns=is_leaving, groups=experts)
    return None


def _rule_of_graph_layers(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read square weights, and blocks on a diagonal, of torch_geometric's convolutions."""
    if not qualified(module).startswith("torch_geometric.nn."):
        return None
    shape = tuple(weight.shape)
    for name in ("channels", "out_channels"):
        size = whole_number(module, name)
        is_between = weight.ndim > 2 or "in_channels" not in module.__dict__
        if shape[-2:] == (size, size) and is_between:
            return WeightRule(attribute, columns=True)
    if weight.ndim == 3:
        groups = whole_number(module, "groups")
        if shape[0] == groups and groups * shape[1] in _sizes(module, "in_channels"):
            return WeightRule(attribute, columns=True)
    inputs = _sizes(module, "in_channels")
    is_convolution = ".conv." in qualified(module)
    if is_convolution and shape[-2] in inputs:
        return WeightRule(attribute, columns=True)
    if weight.ndim == 4:  # (relations, blocks, in / blocks, out / blocks)
        blocks, inputs_each, outputs = shape[1:]
        fits_inputs = blocks * inputs_each in inputs
        if fits_inputs and blocks * outputs in _sizes(module, "out_channels"):
            return WeightRule(attribute, columns=True)
    return None


def _rule_of_routers(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read the weight (experts, width) of a router that keeps only the number of experts."""
    kind = type(module).__name__
    if attribute != "weight" or weight.ndim != 2 or not ("Router" in kind or "Gat" in kind):
        return None
    counts = [whole_number(module, name) for name in _NUMBERS_OF_EXPERTS]
    if weight.shape[0] in counts:
        return WeightRule(attribute)
    return None


def _rule_of_convolutions(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read kernels (out, in, *kernel) of a class whose name says that it is a convolution."""
    for axes in (1, 2, 3):
        fits = f"Conv{axes}d" in type(module).__name__ and weight.ndim == axes + 2
        if fits and attribute == "weight":
            return WeightRule(attribute, kernels=True)
    return None
