"""The encoders of a state dict that decoders beside them mirror."""

from __future__ import annotations

from lightning_hsu._neurons.hints import Layers


class Encoders:
    """The matrices of modules named like encoders, by what these are in.

    Args:
        layers: All tensors of the state dict by layer. Their numbers are not looked at.

    Example:
        >>> import torch
        >>> layers = {
        ...     "sae.encoder": {"weight": torch.empty(64, 8)},
        ...     "sae.decoder": {"weight": torch.empty(8, 64)},
        ... }
        >>> Encoders(layers).are_mirrored_by("sae.decoder", 8, 64)
        True
    """

    def __init__(self, layers: Layers) -> None:
        self._mirroring: dict[str, set[tuple[int, int]]] = {}  # sizes, by what holds the encoder
        for (above, _), shapes in _shapes_of_encoders(layers).items():
            if len(shapes) == 1:
                outputs, inputs = shapes[0]
                self._mirroring.setdefault(above, set()).add((inputs, outputs))

    def are_mirrored_by(self, path: str, outputs: int, inputs: int) -> bool:
        """Whether a matrix decodes what that of an encoder beside it encodes, into fewer dimensions.

        See :func:`~lightning_hsu._neurons.names.mirrored_encoder`.

        Args:
            path: Path of its layer.
            outputs: How many dimensions it decodes into.
            inputs: How many features it decodes.
        """
        above = path.rpartition(".")[0]
        return inputs > outputs and (outputs, inputs) in self._mirroring.get(above, ())


def _shapes_of_encoders(layers: Layers) -> dict[tuple[str, str], list[tuple[int, ...]]]:
    """The shapes (out, in) of all matrices inside an encoder, by the path above it and its name."""
    found: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for path, leaves in layers.items():
        weight = leaves.get("weight")
        if weight is None or weight.ndim != 2:
            continue
        parts = path.split(".")
        for depth, name in enumerate(parts):
            if "enc" in name.lower():
                above = ".".join(parts[:depth])
                found.setdefault((above, name), []).append(tuple(weight.shape))
    return found
