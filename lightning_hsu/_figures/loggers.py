"""How a figure gets to a logger: each kind has its own way, and files serve all others."""

from __future__ import annotations

import io
from collections.abc import Callable
from posixpath import join
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn
    from lightning_hsu._figures.draw import Figure

Way = Callable[[Any, str, "Figure", int], None]
"""Takes a logger, a figure's name, the figure and the optimizer steps done."""


def way_to(logger: object) -> Way | None:
    """How figures get to a logger; None where that is not known.

    By the names of its classes: no logger's package need be there, and lightning and pytorch_lightning have one each.
    """
    return next(
        (_WAYS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in _WAYS), None
    )


def save_png(folder: str, tag: str, figure: Figure, step: int) -> None:
    """Write a figure into a folder, which may be on any file system that Lightning can write to."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    files = get_filesystem(folder)
    files.makedirs(folder, exist_ok=True)
    with files.open(join(folder, _file_name(tag, step)), "wb") as file:
        file.write(picture.getvalue())


def _file_name(tag: str, step: int) -> str:
    return f"{tag.replace('/', '_')}-{step}.png"


def _to_tensorboard(logger: Any, tag: str, figure: Figure, step: int) -> None:
    from lightning_hsu._figures.draw import pixels

    # The same as add_figure, which would import pyplot.
    logger.experiment.add_image(tag, pixels(figure), step, dataformats="HWC")


def _to_files(logger: Any, tag: str, figure: Figure, step: int) -> None:
    _ = logger.experiment  # makes its folder: one that is not empty by then would make it warn
    save_png(join(logger.log_dir, "figures"), tag, figure, step)


def _to_wandb(logger: Any, tag: str, figure: Figure, step: int) -> None:
    from lightning_hsu._figures.draw import pixels

    logger.log_image(
        key=tag, images=[pixels(figure).numpy()], step=step
    )  # of a figure it would ask pyplot


def _to_mlflow(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"figures/{_file_name(tag, step)}")


def _to_comet(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(figure_name=tag, figure=figure, overwrite=False, step=step)


def _nowhere(logger: Any, tag: str, figure: Figure, step: int) -> None:
    """A trial run with fast_dev_run leaves nothing."""


_WAYS: dict[str, Way] = {
    "TensorBoardLogger": _to_tensorboard,
    "CSVLogger": _to_files,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
    "CometLogger": _to_comet,
    "DummyLogger": _nowhere,
}
