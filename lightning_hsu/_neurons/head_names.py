"""Names that output layers have, in any library, in transformers, and in the order of a model."""

from __future__ import annotations

LANGUAGE_HEAD = "lm_head"
"""The output layer of most language models."""

HEAD_NAMED_AS_TABLE = "embed_out"
"""The output layer of GPT-NeoX, a Linear whose name sounds like that of an embedding."""

_ANYWHERE = (
    "head",
    "heads",
    "head_dist",
    LANGUAGE_HEAD,
    HEAD_NAMED_AS_TABLE,
    "classifier",
    "classification_head",
    "segmentation_head",
    "class_head",
    "cls_head",
    "cls_score",
    "class_embed",
    "logits",
    "to_logits",
    "last_linear",
    "fc",
    "fc_out",
    "conv_out",
    "proj_out",
    "out_conv",
    "final_conv",
    "final_layer",
    "output_layer",
    "readout",
)
"""Parts of names that output layers have in any library, of a model whose type is not known."""

TASK_HEADS = (
    "classifier",
    "classifier.out_proj",
    "classifier.1",
    "classification_head.out_proj",
    "score",
    "qa_outputs",
    "logits_proj",
    "decode_head.classifier",
    LANGUAGE_HEAD,
)
"""Output layers of other models than language models, as transformers names them; the first counts."""

LAST_IN_TRANSFORMERS = (
    *("head", "discriminator_predictions", "cls", LANGUAGE_HEAD, "qa_outputs", "logits_proj"),
    *("classifier", "itm_head", "start_classifier", "end_classifier", "bbox_predictor"),
    "predict_return",
)
"""Modules of transformers that give the output, in the order in which they stand in a model."""

LAST_IN_FILES = ("head", "classifier", "fc", LANGUAGE_HEAD, "score", "logits")
"""Modules that come last in any model, whatever their place in a file in the order of names."""


def depth_of_head_name(path: str) -> int | None:
    """Where in a path the name of an output layer stands, if it is outside all blocks.

    Example:
        >>> depth_of_head_name("model.lm_head.dense")
        1
        >>> depth_of_head_name("layers.0.fc") is None
        True
    """
    for depth, part in enumerate(path.split(".")):
        if part in _ANYWHERE:
            return depth
        if part.isdigit():  # within a block that is repeated
            return None
    return None
