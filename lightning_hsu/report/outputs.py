"""What the command line writes: files, the standard output, a progress bar."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_hsu._monitor.render import shorten
from lightning_hsu.report.looks import Progress

_LONGEST_LAYER = 24  # columns of a layer's name beside the progress bar


def check_writable(html: str | None, json: str | None, *, keep: Sequence[str]) -> None:
    """Refuse, before the work, output files that cannot be written or are also read."""
    for option, name in (("--html", html), ("--json", json)):
        if name == "":
            raise ValueError(f"{option} needs the name of a file; got an empty one")
    if html == "-":
        raise ValueError("--html needs the name of a file; only --json takes -")
    names = [html, None if json == "-" else json]
    if html and json and Path(html).resolve() == Path(json).resolve():
        raise ValueError(f"--html and --json name the same file: {html}")
    for name in names:
        if not name:
            continue
        path = Path(name)
        if path.exists() and any(Path(one).exists() and path.samefile(one) for one in keep):
            raise ValueError(f"cannot write {path}: it is one of the files to read")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
        to_change = path if path.exists() else path.parent
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a folder")
        if not os.access(to_change, os.W_OK):
            raise PermissionError(f"cannot write {path}")


def write_file(path: str, text: str) -> None:
    """Write a file; an error names it."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def printing() -> Iterator[None]:
    """Print to the standard output; an error says that it is this which cannot be written.

    Characters that its encoding lacks, as a layer's name may have, are written as escapes.
    """
    if sys.stdout is None:
        raise OSError("cannot write to the standard output: it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise OSError(f"cannot write to the standard output: {error.strerror}") from error


def drop_output() -> None:
    """Let what is left to print go nowhere, so that Python does not try it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A progress bar of rich in a terminal, removed when the work is done.

    It shows the time that has passed and the time that is left, both of all layers.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars
    except ModuleNotFoundError:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=14),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True, speed_estimate_period=600) as bars:
        task = bars.add_task("reading", total=1.0)

        def show_progress(name: str, part: float) -> None:
            shown = escape(shorten(name, _LONGEST_LAYER))
            bars.update(task, description=shown, completed=part)

        yield show_progress
