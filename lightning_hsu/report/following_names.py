"""Which layer of a state dict takes what another gives: what names and shapes tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_hsu._monitor.text import layer_named
from lightning_hsu._neurons.wrappers import plain_name, without_prefixes
from lightning_hsu.report.activations import RELU
from lightning_hsu.report.steps import USUAL_EPS, Step, Steps, Stored, shapes_of

_NUMBERED = re.compile(r"(fc|conv|linear|lin|dense|layer|hidden|l|)[_]?(\d+)")
_IF_RELU = "if ReLU or nothing lies between"
_WEIGHTS_OF_ENCODERS = ("encoder.weight", "W_enc")
_BIASES_OF_ENCODERS = ("encoder.bias", "b_enc", "encoder_bias", "latent_bias")
_WEIGHTS_OF_DECODERS = ("decoder.weight", "W_dec")
_BIASES_OF_INPUTS = ("decoder.bias", "b_dec", "decoder_bias", "pre_bias", "b_pre", "bias")
"""What is beside them in an autoencoder of one encoder and one decoder."""
_MAY_BE_TRANSPOSED = re.compile(r"(^|[._])(dec|up|gen)|deconv|transp", re.IGNORECASE)
"""In names of convolutions whose weights may be (inputs, outputs)."""
_PLAIN_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST_LINEAR = re.compile(r"(fc|linear|lin|dense|classifier|head|out)[_]?1?")


def steps_of_names(tensors: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> Steps:
    """The pairs of layers of a state dict that names and shapes tell.

    They have one parent and numbers that follow each other ("net.0" and "net.2", "fc1" and "fc2",
    "conv1" and "conv2"), or are the last convolution and the first Linear there or of the next
    ``nn.Sequential``, or the last Linear of an ``encoder`` and the first of the ``decoder`` beside
    it. The shapes must fit, and between them in the file there is nothing, or the batch norm of the
    first. An ``encoder`` or ``W_enc`` is followed by the ``decoder`` or ``W_dec`` if the two are
    all that is there, but for biases: a gate or a threshold is no ReLU.

    Args:
        tensors: By name; only their shapes are read.
        tensor: Returns the numbers of one by its name.
    """
    stored = _stored_names(tensors)
    tensors = {name: tensors[own] for name, own in stored.items()}

    def read(name: str) -> Tensor:
        return tensor(stored[name])

    layers = []
    for name, x in tensors.items():
        if name.endswith(".weight") and x.ndim > 1:
            layers.append(name.removesuffix(".weight"))
    order = {name: place for place, name in enumerate(tensors)}
    steps = []
    plain = _plain_layers(layers, tensors)
    doubtful = _doubtful_groups(layers, tensors)
    reasons = {}
    for layer, following in pairwise(layers):
        first = tensors[f"{layer}.weight"].shape
        second = tensors[f"{following}.weight"].shape
        if not (_names_follow(layer, following, first, second) and _fit(first, second)):
            continue
        if layer in doubtful:
            reasons[layer] = "it may be a convolution in groups"
            continue
        if layer not in plain or following not in plain:
            own = layer if layer not in plain else following
            reasons[layer] = f"the weights of {layer_named(own)} may not be used as they are stored"
            continue
        between = list(tensors)[order[f"{layer}.weight"] + 1 : order[f"{following}.weight"]]
        owners = {name.rpartition(".")[0] for name in between} - {layer, following}
        norm = None
        if owners:
            norm = min(owners)
            if len(owners) > 1 or not _is_norm(norm, tensors, first[0]):
                reasons[layer] = f"{layer_named(norm)} lies between in the file"
                continue
        elif _has_other_norms(layer, tensors):
            reasons[layer] = "a norm beside it may lie between"
            continue
        condition = _IF_RELU
        if len(first) > 2:
            condition = "if ReLU, pooling or nothing lies between"
            condition += _if_not_transposed({layer: first, following: second})
            condition += f" and {layer_named(layer)} is not grouped"
        if norm is not None:
            condition += f" and the norm's eps is {USUAL_EPS:g}, which the file does not say"
        steps.append(Step(layer, following, RELU, condition, norm, keeps_sign=False))
    steps += _autoencoders(tensors)
    how = "names and shapes tell which layer follows; the file does not say how they are connected"
    way_out = "in Python, merges(model) follows the model itself"
    otherwise = "names tell of no layer that takes its outputs"
    shapes = shapes_of(tensors)
    return Steps(steps, how, read, shapes, {}, way_out, reasons, otherwise)


def _stored_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors as they are stored, by those without what wrappers of models add."""
    names = [name for name, x in tensors.items() if isinstance(x, Tensor)]
    stored = {}
    for own, short in zip(names, without_prefixes(dict.fromkeys(names)), strict=True):
        stored[plain_name(short)] = own
    if len(stored) < len(names):  # two are one without it
        return dict(zip(names, names, strict=True))
    return stored


def _autoencoders(tensors: Mapping[str, Tensor]) -> list[Step]:
    """The encoders of autoencoders, each with its decoder."""
    steps = []
    for name in tensors:
        for own in _WEIGHTS_OF_ENCODERS:
            above = name.removesuffix(own)
            if name.endswith(own) and (not above or above.endswith(".")):
                step = _autoencoder(above, own, tensors)
                if step is not None:
                    steps.append(step)
    return steps


def _autoencoder(above: str, own: str, tensors: Mapping[str, Tensor]) -> Step | None:
    """An encoder and its decoder; None if there is anything else beside them, or no shape fits.

    Args:
        above: What the names of all tensors of the autoencoder begin with.
        own: The rest of the name of the encoder's weight.
        tensors: By name.
    """
    biases = []
    decoders = []
    for name, x in tensors.items():
        if not name.startswith(above):
            continue
        rest = name.removeprefix(above)
        if rest in _BIASES_OF_ENCODERS:
            biases.append(name)
        elif rest in _WEIGHTS_OF_DECODERS:
            decoders.append(rest)
        elif rest != own and rest not in _BIASES_OF_INPUTS and not _is_count(x):
            return None
    weight = tensors[above + own]
    if len(biases) > 1 or len(decoders) != 1 or weight.ndim != 2:
        return None
    read = (above + own, above + decoders[0], *biases)
    if not all(_is_plain(tensors[name]) for name in read):
        return None
    columns = own == "W_enc" and weight.shape[1] >= weight.shape[0]
    if biases and own == "W_enc" and weight.shape[0] != weight.shape[1]:
        columns = tensors[biases[0]].shape == weight.shape[1:]
    stored = Stored(above + own, columns)
    n = weight.shape[1] if columns else weight.shape[0]
    if biases and tensors[biases[0]].shape != (n,):
        return None
    (decoder,) = decoders
    following = tensors[above + decoder]
    rows = decoder == "W_dec" and following.shape[0] == n
    if following.ndim != 2 or following.shape[0 if rows else 1] != n:
        return None
    return Step(
        above + own.removesuffix(".weight"),
        above + decoder.removesuffix(".weight"),
        RELU,
        _IF_RELU,
        keeps_sign=False,
        weight=stored,
        following_weight=Stored(above + decoder, rows),
        bias=biases[0] if biases else None,
    )


def _is_count(x: Tensor) -> bool:
    """Whether a tensor counts something for each neuron: a single number may be the k of a top-k."""
    return x.ndim == 1 and len(x) > 1 and not (x.is_floating_point() or x.is_complex())


def _doubtful_groups(layers: Sequence[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """Convolutions that take fewer channels than what comes before gives: they may be grouped.

    Then neurons of one kernel see different channels, and none can be merged. One channel may come
    in only where the file begins.
    """
    kernels = []
    for name in layers:
        if tensors[f"{name}.weight"].ndim > 2:
            kernels.append(name)
    doubtful = set()
    for before, layer in pairwise(kernels):
        first = tensors[f"{before}.weight"].shape
        second = tensors[f"{layer}.weight"].shape
        is_next = _names_follow(before, layer, first, second)
        if second[1] == 1 or (is_next and second[1] != first[0]):
            doubtful.add(layer)
    return doubtful


def _plain_layers(layers: Sequence[str], tensors: Mapping[str, Tensor]) -> set[str]:
    """Layers whose weights are stored as they are used, beside at most one bias for each neuron.

    Scales, masks and the like would change them.
    """
    sizes = {}
    for layer in layers:
        sizes[layer] = tensors[f"{layer}.weight"].shape[:1]
    plain = set(layers)
    for name, x in tensors.items():
        layer, _, key = name.rpartition(".")
        is_bias = key == "bias" and x.shape == sizes.get(layer)
        if not (is_bias or key == "weight") or not _is_plain(x):
            plain.discard(layer)
    return plain


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is stored number by number, none of them in few bits."""
    is_stored = x.layout == torch.strided and not x.is_meta
    return is_stored and x.dtype in _PLAIN_TYPES and x.numel() > 0


def _fit(first: torch.Size, second: torch.Size) -> bool:
    """Whether the outputs of one weight are the inputs of another."""
    if len(first) == 2 or len(second) > 2:
        return len(first) == len(second) and second[1] == first[0]
    return second[1] % first[0] == 0


def _names_follow(layer: str, following: str, first: torch.Size, second: torch.Size) -> bool:
    """Whether names say that one layer takes what the other gives."""
    parent, _, own = layer.rpartition(".")
    other_parent, _, other = following.rpartition(".")
    one = _NUMBERED.fullmatch(own)
    two = _NUMBERED.fullmatch(other)
    becomes_linear = len(first) > 2 and len(second) == 2
    for shape in (first, second):
        is_likely = _MAY_BE_TRANSPOSED.search(layer) or _has_even_sides(shape)
        if is_likely and _is_square(shape):
            return False  # the shape does not tell whether a neuron is a row
    if parent != other_parent:
        above, _, last = parent.rpartition(".")
        siblings = above == other_parent.rpartition(".")[0]
        if siblings and last == "encoder" and other_parent.endswith("decoder"):
            return len(first) == len(second) == 2 and own.isdecimal() and other == "0"
        are_sequential = own.isdecimal() and other.isdecimal() and parent and other_parent
        return becomes_linear and siblings and bool(are_sequential)
    if one and two and one[1] == two[1]:
        step = int(two[2]) - int(one[2])
        return step == 1 or (own.isdecimal() and step > 0)
    return becomes_linear and bool(one) and bool(_FIRST_LINEAR.fullmatch(other))


def _is_square(shape: torch.Size) -> bool:
    """Whether a convolution has as many inputs as outputs."""
    return len(shape) > 2 and shape[0] == shape[1]


def _has_even_sides(shape: torch.Size) -> bool:
    """Whether kernels are of a size that transposed convolutions often have, such as 4 x 4."""
    return len(shape) > 2 and all(side % 2 == 0 for side in shape[2:])


def _if_not_transposed(shapes: Mapping[str, torch.Size]) -> str:
    """A condition on convolutions with as many inputs as outputs, by name; "" if there is none."""
    names = []
    for name, shape in shapes.items():
        if _is_square(shape) and max(shape[2:]) > 1:
            names.append(layer_named(name))
    if not names:
        return ""
    return f" and {' and '.join(names)} {'is' if len(names) == 1 else 'are'} not transposed"


def _is_norm(name: str, tensors: Mapping[str, Tensor], n: int) -> bool:
    """Whether these are the tensors of a batch norm of n neurons."""
    mean = tensors.get(f"{name}.running_mean")
    return mean is not None and f"{name}.running_var" in tensors and mean.shape == (n,)


def _has_other_norms(layer: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether there may be a norm after a layer that its place in the file does not tell of."""
    parent, _, own = layer.rpartition(".")
    if own.isdecimal():
        return False  # its place is its number
    for name, x in tensors.items():
        owner, _, key = name.rpartition(".")
        is_beside = owner.rpartition(".")[0] == parent and x.ndim < 2
        if is_beside and key in ("weight", "running_mean"):
            return True
    return False
