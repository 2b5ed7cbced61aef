"""What the names in a state dict say: codebooks, dictionaries, tables, adapters, statistics."""

from __future__ import annotations

import torch
from torch import nn

from lightning_hsu._neurons import names
from lightning_hsu._neurons.candidates import full_name
from lightning_hsu._neurons.head_names import HEAD_NAMED_AS_TABLE
from lightning_hsu._neurons.hints import Hint
from lightning_hsu._neurons.how import WeightRule
from lightning_hsu._neurons.packed import without_factors
from lightning_hsu._neurons.shapes import Shape, Shapes, below, words
from lightning_hsu._neurons.table_names import (
    is_other_table,
    is_table_of_tokens,
    sounds_like_table,
    why_tokens_are_left_out,
)

_STATISTICS = (
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "inv_freq",
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "causal_mask",
    "anchors",
    "cluster_size",
    "embed_avg",
    "embedding_avg",
    "embed_sum",
    "ema_w",
    "ema_dw",
    "ema_cluster_size",
    "ema_embed",
    "codebook_mean",
    "codebook_variance",
    "class_weights",
    "task_weights",
)
"""Buffers that hold no neurons."""

_TABLES_OF_CODES = (*names.IN_QUANTIZERS, "codebook", "_codebook")
_CODES = (*_TABLES_OF_CODES, "codebooks", "weight")
_COUNTS = ("cluster_size", "ema_cluster_size", "_ema_cluster_size", "N")
_AVERAGES = ("embed_avg", "embed_sum", "ema_w", "_ema_w", "ema_embed", "ema_dw")
_FEATURES = (
    "b_enc",
    "latent_bias",
    "encoder_bias",
    "threshold",
    "log_threshold",
    "b_gate",
    "b_mag",
    "r_mag",
    "gate_bias",
    "mag_bias",
)
"""Vectors with an entry for each feature of a sparse autoencoder."""
_WIDTHS = ("b_dec", "pre_bias", "decoder_bias", "b_dec_out", "b_pre")
"""Vectors with an entry for each dimension that it encodes."""
_COPIES = (
    "integer",
    "int",
    "int8",
    "quantized",
    "quantised",
    "copy",
    "ema",
    "avg",
    "average",
    "shadow",
    "backup",
    "mask",
)
"""What a name adds to that of a weight for a tensor of its shape that is computed from it."""
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class StoredNames:
    """Tells what a weight is by its name and those beside it.

    Args:
        shapes: The shapes of all tensors.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._is_normed: bool | None = None

    def hint(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """How a weight is read; None if its name says nothing.

        Args:
            path: Path of its layer.
            leaf: Its name.
            shape: Its shape.
        """
        for ask in (
            self._adapter,
            self._quantiser,
            self._no_weight,
            self._dictionary,
            self._table,
            self._smoothed,
            self._standardised,
        ):
            hint = ask(path, leaf, shape)
            if hint is not None:
                return hint
        return None

    def _adapter(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """The factors of an adapter, and the layer that they change."""
        parts = path.split(".")
        for factor in _FACTORS:
            if factor in parts or leaf == factor:
                return Hint(why_not="a factor of an adapter, whose scale is not stored")
        above, _, last = path.rpartition(".")
        if last == "base_layer":
            for factor in _FACTORS:
                if self._shapes.has(above, factor) or factor in self._shapes.leaves(above):
                    note = (
                        "the layer without its adapter, whose scale is not stored: merge it, or "
                        "report the model itself"
                    )
                    return Hint(note=note)
        if "original_module" in parts:
            at = parts.index("original_module")
            if self._shapes.has(".".join(parts[:at]), "modules_to_save"):
                return Hint(
                    why_not="a copy that the forward pass does not use: another one has its place"
                )
        return None

    def _quantiser(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """A codebook, with codes along the axis that has as many as their counts."""
        if leaf not in _CODES or len(shape) not in (2, 3):
            return None
        lower = path.lower()
        if leaf == "weight":
            above, _, last = path.rpartition(".")
            is_table = last in _TABLES_OF_CODES
            is_inside = any(part in above.lower() for part in (*names.QUANTIZERS, "vq"))
            beside = self._shapes.leaves(above)
            is_counted = any(name in beside for name in (*_COUNTS, *_AVERAGES))
            is_table = is_table and len(shape) == 2 and self._shapes.vector(path) is None
            if is_table and (is_inside or is_counted or "codebook" in last):
                return Hint(kind="codebook")
            return None
        beside = self._shapes.leaves(path)
        is_inside = any(part in lower for part in names.QUANTIZERS)
        is_counted = any(name in beside for name in (*_COUNTS, *_AVERAGES))
        if not (is_inside or is_counted or "codebook" in leaf):
            return None
        columns = False
        for name in _COUNTS:
            counts = beside.get(name)
            if counts and shape[-2] != shape[-1]:
                columns = counts[-1] == shape[-1] and counts[-1] != shape[-2]
        return Hint(WeightRule(leaf, columns=columns), "codebook")

    def _no_weight(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """Statistics, masks, biases and tables of tokens."""
        if leaf in _STATISTICS:
            return Hint(why_not="statistics, a mask or an index: it holds no neurons")
        if leaf in ("weight", "kernel"):
            return None
        base, _, ending = leaf.rpartition("_")
        if ending.lower() in _COPIES and self._shapes.of(path, base) == shape:
            return Hint(why_not=f"a copy or mask of '{base}', which is measured")
        meta = torch.empty(shape, device="meta")
        reason = names.why_no_neurons(nn.Module(), leaf, meta)
        if reason is not None and "weight" not in leaf:
            return Hint(why_not=reason)
        if "embedding" in leaf and leaf not in _CODES and is_table_of_tokens(leaf, meta):
            name = full_name(path, leaf)
            return Hint(why_not=why_tokens_are_left_out(name))
        return None

    def _dictionary(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """The encoder or decoder of a sparse autoencoder, or several of them in one."""
        if leaf not in names.DIRECTIONS:
            return None
        features = self._length(path, _FEATURES, "encoder")
        width = self._length(path, _WIDTHS, "decoder")
        name = full_name(path, leaf)
        if len(shape) == 3:
            return self._crosscoder(leaf, shape, features, name)
        if len(shape) != 2:
            return None
        first, last = shape
        if first != last:
            for length, by_columns in ((features, last), (width, first)):
                if length in shape:
                    return Hint(WeightRule(leaf, columns=length == by_columns), "other")
        columns = last > first  # there are more features than dimensions
        if first == last:
            columns = leaf not in names.DECODERS
        return Hint(
            WeightRule(leaf, columns=columns),
            "other",
            names.dictionary_note(name, mirrored=columns),
        )

    def _crosscoder(self, leaf: str, shape: Shape, features: int | None, name: str) -> Hint:
        """Directions that span several models or layers: one axis has the features."""
        if features == shape[0] and features not in shape[1:]:
            return Hint(WeightRule(leaf, kernels=True), "other")
        if features == shape[2] and features not in shape[:2]:
            return Hint(WeightRule(leaf, outputs_last=True), "other")
        if features == shape[1] and features not in (shape[0], shape[2]):
            return Hint(WeightRule(leaf), "other")
        note = (
            f"read as {shape[0]} matrices by rows, a guess; otherwise: "
            f"neurons={{'{name}': lambda w: ...}}"
        )
        return Hint(WeightRule(leaf), "other", note)

    def _length(self, path: str, leaves: tuple[str, ...], child: str) -> int | None:
        """The length of the first of these vectors that there is, or of a child's bias."""
        for leaf in leaves:
            length = self._shapes.vector(path, leaf)
            if length is not None:
                return length
        return self._shapes.vector(below(path, child))

    def _table(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """A look-up table whose name does not say so, or a layer whose name says that it is one."""
        if leaf != "weight" or len(shape) != 2:
            return None
        if self._shapes.vector(path) == shape[0]:
            if sounds_like_table(path):
                return Hint(kind="linear")  # a table has no bias
            return None
        if path.rpartition(".")[2] == HEAD_NAMED_AS_TABLE:
            return Hint(kind="linear")
        if is_other_table(path):
            return Hint(kind="embedding")
        return None

    def _smoothed(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """A note on a weight whose inputs are multiplied by factors in a quantiser beside it."""
        factors = "_pre_quant_scale"
        beside = self._shapes.leaves(below(path, "input_quantizer"))
        if leaf != "weight" or factors not in beside:
            return None
        return Hint(note=without_factors(f"input_quantizer.{factors}"))

    def _standardised(self, path: str, leaf: str, shape: Shape) -> Hint | None:
        """A note on convolutions that may standardise their weights, as those of BiT do."""
        if leaf != "weight" or len(shape) != 4 or "conv" not in path.rpartition(".")[2]:
            return None
        if "gain" in self._shapes.leaves(path):
            return Hint(note=_STANDARDISED)
        if self._shapes.vector(path) is not None or not self._has_group_norms():
            return None
        return Hint(note=_STANDARDISED)

    def _has_group_norms(self) -> bool:
        """Whether all normalizations beside convolutions without a bias are of groups."""
        if self._is_normed is not None:
            return self._is_normed
        convolutions = 0
        norms = 0
        self._is_normed = False
        for path, leaves in self._shapes.layers.items():
            if "running_mean" in leaves:
                return False
            shape = leaves.get("weight", ())
            is_wide = len(shape) == 4 and shape[3] > 1 and shape[1] > 3
            if is_wide and "conv" in path.rpartition(".")[2] and "bias" not in leaves:
                convolutions += 1
            elif len(shape) == 1 and "norm" in words(path):
                norms += 1
        self._is_normed = convolutions > 1 and norms >= convolutions
        return self._is_normed


_STANDARDISED = (
    "read as stored; if the model standardises the weights of its convolutions, as those with "
    "group normalization often do, report the model itself"
)
