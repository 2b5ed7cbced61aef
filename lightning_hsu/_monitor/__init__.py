"""Measurements of the layers, and their numbers and tables as text."""
