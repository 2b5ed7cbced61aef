"""Real models: torchmetrics imports torchvision, which may need help to be imported at all."""

from tests.real_models.torchvision_ops import declare_missing_operators

declare_missing_operators()
