"""The pages for readers, as tests look for sentences in them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def in_one_line(path):
    """A page's text without its line breaks.

    Args:
        path: From the root of the repository.
    """
    return " ".join((ROOT / path).read_text().split())
