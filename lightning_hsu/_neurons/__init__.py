"""Finds the sets of neurons of a model or a state dict."""
