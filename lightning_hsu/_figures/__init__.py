"""Pictures of a training, and how they get to the loggers."""
