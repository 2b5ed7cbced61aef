"""Uniformity as torchmetrics: of a model's neurons and of embeddings, by any measure."""

from lightning_hsu.metrics.features import FeatureUniformity
from lightning_hsu.metrics.weights import WeightUniformity

__all__ = ["FeatureUniformity", "WeightUniformity"]
