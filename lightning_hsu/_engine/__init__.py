"""One step of the penalty: what it acts on, how strongly and where."""
