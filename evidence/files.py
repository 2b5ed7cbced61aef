"""Files of results: written whole or not at all, and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of ``path`` at the end, if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}")  # another process may write it, too
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    with whole(path) as part:
        part.write_text(text)


def read(path: Path) -> Any:
    """What a file of results holds; numbers that are not finite are None."""
    return json.loads(path.read_text(), parse_constant=lambda _: None)
