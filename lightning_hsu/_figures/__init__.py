"""Figures of a training run, and how they reach the loggers."""
