"""All real models, from the files beside this one."""

from tests.real_models import language, others, vision
from tests.real_models.base import RealModel


def entries() -> list[RealModel]:
    """The models, by library."""
    return [*language.MODELS, *vision.MODELS, *others.MODELS]
