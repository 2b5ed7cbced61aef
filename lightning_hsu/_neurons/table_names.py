"""Names of look-up tables, of tokens or positions, and of layers that only sound like tables."""

from __future__ import annotations

from torch import Tensor

from lightning_hsu._neurons.head_names import HEAD_NAMED_AS_TABLE

_IN_LAST_PART = ("embed", "wte", "wpe")
_LAST_WORDS = ("emb", "embs", "shared", "lookup")
_OF_POSITION_BIASES = ("relative_attention_bias", "relative_position_bias", "rel_pos_bias")
_IN_TRANSFORMERS = ("shared", "relative_attention_bias")
_MAPS = (
    *("embedding_hidden_mapping_in", "embeddings_project", "decoder_embed"),
    *(HEAD_NAMED_AS_TABLE, "patch_embedding", "embed_state", "embed_action"),
)
_TOKENS = (
    "token",
    "pos_emb",
    "position",
    "pos_enc",
    "w_pos",
    "query",
    "queries",
    "prompt",
    "latents",
    "mem_k",
    "mem_v",
)


def sounds_like_table(path: str) -> bool:
    """Whether the last part of a layer's path has a word for a look-up table in it.

    Example:
        >>> sounds_like_table("model.embed_tokens"), sounds_like_table("embeddings.dense")
        (True, False)
    """
    last = path.rpartition(".")[2].lower()
    return any(part in last for part in _IN_LAST_PART)


def is_other_table(path: str) -> bool:
    """Whether a layer without a bias is a table by a name that does not sound so."""
    last = path.rpartition(".")[2]
    is_of_biases = last.startswith(_OF_POSITION_BIASES)
    return is_of_biases or last.lower().split("_")[-1] in _LAST_WORDS


def is_table_in_transformers(name: str) -> bool:
    """Whether a layer of transformers of this name is a table, though it does not sound so."""
    return name in _IN_TRANSFORMERS


def is_map_in_transformers(name: str) -> bool:
    """Whether a layer of transformers of this name is a Linear, though it sounds like a table."""
    return name in _MAPS


def is_table_of_tokens(attribute: str, weight: Tensor) -> bool:
    """Whether a bare parameter is a table of tokens, positions or queries, as an embedding is."""
    lower = attribute.lower()
    if any(part in lower for part in _TOKENS):
        return True
    return weight.ndim == 3 and weight.shape[0] == 1 and "embed" in lower


def why_tokens_are_left_out(name: str) -> str:
    """The reason for a bare parameter that is a table of tokens, and how to take it in.

    Args:
        name: Its whole name.
    """
    return (
        "an embedding of tokens or positions, measured only when asked for: "
        f"neurons={{'{name}': 'rows'}}"
    )
