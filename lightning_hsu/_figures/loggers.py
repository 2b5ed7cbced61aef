"""How figures reach loggers: one sender for each kind of logger, and PNG files for all others."""

from __future__ import annotations

import io
from collections.abc import Callable
from posixpath import join
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.cloud_io import get_filesystem

if TYPE_CHECKING:  # matplotlib is imported only when something is drawn
    from lightning_hsu._figures.draw import Figure

Sender = Callable[[Any, str, "Figure", int], None]
"""Takes a logger, a figure's name, the figure and the optimizer steps done."""


def sender_for(logger: object) -> Sender | None:
    """The function that sends figures to a logger; None for an unknown kind of logger.

    Kinds are recognised by class names: no logger's package has to be installed, and lightning and
    pytorch_lightning each have classes of their own.
    """
    for kind in type(logger).__mro__:
        if kind.__name__ in _SENDERS:
            return _SENDERS[kind.__name__]
    return None


def save_png(folder: str, tag: str, figure: Figure, step: int) -> None:
    """Write a figure into a folder, on any file system that Lightning can write to."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    files = get_filesystem(folder)
    files.makedirs(folder, exist_ok=True)
    with files.open(join(folder, _file_name(tag, step)), "wb") as file:
        file.write(png.getvalue())


def _file_name(tag: str, step: int) -> str:
    return f"{tag.replace('/', '_')}-{step}.png"


def _to_tensorboard(logger: Any, tag: str, figure: Figure, step: int) -> None:
    from lightning_hsu._figures.draw import pixels

    # Not add_figure, which imports pyplot; the images are the same.
    logger.experiment.add_image(tag, pixels(figure), step, dataformats="HWC")


def _to_files(logger: Any, tag: str, figure: Figure, step: int) -> None:
    _ = logger.experiment  # creates its folder first: it would warn if the folder were not empty
    save_png(join(logger.log_dir, "figures"), tag, figure, step)


def _to_wandb(logger: Any, tag: str, figure: Figure, step: int) -> None:
    from lightning_hsu._figures.draw import pixels

    # Not the figure itself, since that would import pyplot.
    logger.log_image(key=tag, images=[pixels(figure).numpy()], step=step)


def _to_mlflow(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, figure, f"figures/{_file_name(tag, step)}")


def _to_comet(logger: Any, tag: str, figure: Figure, step: int) -> None:
    logger.experiment.log_figure(figure_name=tag, figure=figure, overwrite=False, step=step)


def _nowhere(logger: Any, tag: str, figure: Figure, step: int) -> None:
    """Drop the figure: a trial run with fast_dev_run leaves nothing behind."""


_SENDERS: dict[str, Sender] = {
    "TensorBoardLogger": _to_tensorboard,
    "CSVLogger": _to_files,
    "WandbLogger": _to_wandb,
    "MLFlowLogger": _to_mlflow,
    "CometLogger": _to_comet,
    "DummyLogger": _nowhere,
}
