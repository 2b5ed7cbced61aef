"""What the names of weights say: dictionaries, codebooks, prototypes, and what holds no neurons."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_hsu._neurons.candidates import NeuronSet
from lightning_hsu._neurons.head_names import LANGUAGE_HEAD
from lightning_hsu._neurons.how import WeightRule

_DICTIONARIES = ("W_dec", "dictionary", "atoms")
_NUMBERS_OF_FEATURES = ("d_sae", "dict_size", "num_latents", "n_features", "num_features")
_NUMBERS_OF_CLASSES = (
    "num_classes",
    "n_classes",
    "num_prototypes",
    "n_prototypes",
    "num_clusters",
    "n_clusters",
)
_ENCODERS = ("W_enc",)  # of features, whose directions lie along the same axis
DECODERS = (*_DICTIONARIES, "decoder_weight")
"""Names of matrices that decode the features of sparse autoencoders."""
DIRECTIONS = (*DECODERS, *_ENCODERS, "W_gate", "W_mag")
"""Names of matrices that decode or encode the features of sparse autoencoders."""
_AS_DICTIONARY = "read by columns, as a dictionary"
_CODEBOOKS = ("codebook", "codebooks", "codevectors", "code_book")
_PROTOTYPES = ("prototypes", "proxies", "centers", "centres", "centroids", "class_centers")
_PROJECTIONS = ("proj", "text_projection", "image_projection", "visual_projection")
"""Bare parameters (in, out) by which CLIP and its descendants multiply from the right."""
_POSITION_BIASES = ("relative", "bias_table", "attention_bias")
IN_QUANTIZERS = ("embed", "embedding", "embeddings")
"""Names of tables of codes in quantisers, and of other tables elsewhere."""
QUANTIZERS = ("codebook", "quantiz", "quantis")
"""Parts of the names of quantisers."""
NO_DIRECTIONS = "a factor or shift by entry: it has no directions"
"""Why such a parameter holds no neurons."""


def rule_by_name(module: nn.Module, attribute: str, weight: Tensor) -> WeightRule | None:
    """How to read a bare parameter or buffer whose name says what it holds; None if none does.

    Args:
        module: The module that holds it.
        attribute: Its name in the module.
        weight: The tensor.
    """
    if weight.ndim not in (2, 3):
        return None
    if is_table_of_codes(module, attribute):
        return WeightRule(attribute)
    if weight.ndim != 2:
        return None
    if attribute in _PROTOTYPES:
        return WeightRule(
            attribute, columns=_count_is_last(module, weight, _NUMBERS_OF_CLASSES) is True
        )
    if attribute in _PROJECTIONS:
        return WeightRule(attribute, columns=True)
    classes = module.__dict__.get("num_classes")
    if attribute == "W" and classes in weight.shape:  # of a loss with a margin
        return WeightRule(attribute, columns=weight.shape[1] == classes)
    if attribute in _DICTIONARIES or attribute in _ENCODERS:
        return WeightRule(attribute, columns=_features_last(module, attribute, weight))
    return None


def _features_last(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    """Whether the features of a dictionary, or of its encoder, lie along the second axis."""
    is_last = _count_is_last(module, weight, _NUMBERS_OF_FEATURES)
    if is_last is not None:
        return is_last
    first, last = weight.shape
    if first == last:
        return attribute in _ENCODERS
    return last > first  # there are more features than dimensions


def _count_is_last(module: nn.Module, weight: Tensor, names: tuple[str, ...]) -> bool | None:
    """Whether the second axis of a matrix counts what a module has a number of, not the first.

    None if it keeps no such number.

    Args:
        module: The module.
        weight: The matrix.
        names: Attributes, of the module or of its config, in which the number may be.
    """
    first, last = weight.shape
    for source in (module, getattr(module, "cfg", None), getattr(module, "config", None)):
        for name in names:
            count = getattr(source, name, None)
            if first != last and count in (first, last):
                return bool(count == last)
    return None


def is_table_of_codes(module: nn.Module, attribute: str) -> bool:
    """Whether a bare tensor of a module is a codebook."""
    return attribute in _CODEBOOKS or is_codebook(module, attribute)


def may_be_a_buffer(module: nn.Module, attribute: str) -> bool:
    """Whether a buffer of this name holds codes, prototypes or centres."""
    return is_table_of_codes(module, attribute) or attribute in _PROTOTYPES


def is_codebook(module: nn.Module, attribute: str) -> bool:
    """Whether a tensor of a module, or an embedding in it, is a quantiser's table of codes."""
    kind = type(module).__name__.lower()
    return attribute in IN_QUANTIZERS and any(part in kind for part in QUANTIZERS)


def means_codebook(path: str) -> bool:
    """Whether the last part of an embedding's path says that it is a table of codes."""
    return path.rpartition(".")[2] in _CODEBOOKS


def means_prototypes(path: str) -> bool:
    """Whether the last part of an embedding's path says that it holds prototypes."""
    return path.rpartition(".")[2] in _PROTOTYPES


def is_standardised(module: nn.Module) -> bool:
    """Whether a convolution standardises its weight in the forward pass, as its class's name says."""
    for kind in type(module).__mro__:
        if any(part in kind.__name__ for part in ("StdConv", "WeightStandardized", "WSConv")):
            return True
    return False


def mirrored_encoder(parent: nn.Module, name: str, decoder: nn.Linear) -> bool:
    """Whether a Linear decodes what the encoder beside it encodes, into fewer dimensions.

    Then its columns are the directions that it adds up: the dictionary of a sparse autoencoder.

    Args:
        parent: The module that holds both.
        name: Name of the Linear in it.
        decoder: The Linear.
    """
    if "dec" not in name.lower() or decoder.in_features <= decoder.out_features:
        return False
    children = []  # with weights
    for other, module in parent.named_children():
        if any(p.ndim >= 2 for p in module.parameters()):
            children.append((other, module))
    if len(children) != 2:  # something else lies between
        return False
    for other, module in children:
        if "enc" not in other.lower():
            continue
        linears = [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
        if len(linears) != 1:
            continue
        encoder = linears[0]
        if (encoder.in_features, encoder.out_features) == (
            decoder.out_features,
            decoder.in_features,
        ):
            return True
    return False


def sounds_like_dictionary(path: str) -> bool:
    """Whether a layer's name suggests that its columns, not its rows, may be the directions.

    Or a bare parameter's, such as "prototypes".
    """
    if path in _PROTOTYPES:
        return True
    parts = [part for part in path.lower().split(".") if not part.isdigit()]
    if not parts or LANGUAGE_HEAD in parts:
        return False
    return parts[-1] in ("decoder", "decode", "dec", "w_dec", "dictionary")


def dictionary_note(layer: str, *, mirrored: bool) -> str:
    """What a user should know of how a layer is read that may be a dictionary.

    Args:
        layer: Its name.
        mirrored: Whether its encoder mirrors it, so that its columns are taken.
    """
    if mirrored:
        return f"{_AS_DICTIONARY}; for its rows: neurons={{'{layer}': 'rows'}}"
    return f"read by rows; if its columns are directions: neurons={{'{layer}': 'columns'}}"


def dictionaries(sets: Sequence[NeuronSet]) -> set[str]:
    """Names of the codebooks, and of the decoders and encoders of sparse autoencoders.

    The order of their neurons means nothing: another run has them in another one.
    """
    found = set()
    sizes = set()  # with the path that the encoder of a decoder shares with it
    for one in sets:
        if _is_dictionary(one):
            found.add(one.name)
            sizes.add((one.layer.rpartition(".")[0], one.shape))
    for one in sets:
        above, _, last = one.layer.rpartition(".")
        if "enc" in last.lower() and (above, one.shape) in sizes:
            found.add(one.name)
    return found


def _is_dictionary(one: NeuronSet) -> bool:
    """Whether a set was read as a codebook, or as directions of a sparse autoencoder by name."""
    last = one.name.rpartition(".")[2]
    if last in _PROTOTYPES:  # of classes, in their order
        return False
    return one.kind == "codebook" or _AS_DICTIONARY in one.note or last in DIRECTIONS


def why_no_neurons(module: nn.Module, attribute: str, weight: Tensor) -> str | None:
    """Why a parameter of two or more axes holds no neurons, as its name and shape say."""
    long_axes = [size for size in weight.shape if size != 1]
    if len(long_axes) < 2:
        return "a vector"
    if type(module).__name__.endswith("Norm"):
        return NO_DIRECTIONS
    lower = attribute.lower()
    if any(part in lower for part in _POSITION_BIASES):
        return "a table of position biases"
    if "bias" in lower:
        return "biases"
    if lower == "att" or lower.startswith(("att_", "lin_src_", "lin_dst_")):
        return "attention vectors, one a head"
    return None
