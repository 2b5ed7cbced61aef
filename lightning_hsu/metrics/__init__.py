"""Uniformity as torchmetrics, for a model's neurons and for embeddings, by any measure."""

from lightning_hsu.metrics.features import FeatureUniformity
from lightning_hsu.metrics.weights import WeightUniformity

__all__ = ["FeatureUniformity", "WeightUniformity"]
