"""Real models: torchmetrics imports torchvision, which may need help to be imported at all."""

import warnings

from tests.real_models.torchvision_ops import declare_missing_operators

declare_missing_operators()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own, which hqq meets where transformers imports it
    import torch.utils.mkldnn  # noqa: F401
