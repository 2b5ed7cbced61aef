"""What is measured of a model's layers, and how it is told."""
