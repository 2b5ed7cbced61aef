"""All real models, from the files beside this one."""

from tests.real_models.base import RealModel
from tests.real_models.torchvision_ops import declare_missing_operators


def entries() -> list[RealModel]:
    """The models, by library."""
    declare_missing_operators()  # before anything imports torchvision
    from tests.real_models import language, others, vision

    return [*language.MODELS, *vision.MODELS, *others.MODELS]
