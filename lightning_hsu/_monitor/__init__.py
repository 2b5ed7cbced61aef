"""What is measured of the layers, and its numbers and tables as text."""
