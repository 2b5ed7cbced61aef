"""What the command line says to its user: errors, and texts about Python in its own words."""

from __future__ import annotations

import re
import sys

from lightning_hsu._monitor.render import shorten
from lightning_hsu.report.checkpoints import printable

_LONGEST_WORD = 200  # characters of what a user or a file says, in an error
_LONGEST_LINE = 1000

# What is written for Python, and the same for the command line.
_OPTIONS = (
    (r"neurons=\{'([^']*)':\s'?(rows|columns|[0-9]+)'?\}", r"--neurons '\1=\2'"),
    (r"\b(include|exclude|head)=('[^']*')", r"--\1 \2"),
    (r'\bhead="NAME"', "--head NAME"),
    (r"\bhead=None\b", "--head none"),
    (r"\bkey=('[^']*')", r"--key \1"),
    (r"\bmatch='([^']*)'", r"--match \1"),
    (r"\bto_json\(\)", "--json"),
    (r" with --key or key=", " with --key"),
    (r"\b(include|exclude|head|neurons|measure|key)=", r"--\1 "),
)


def in_options(text: str) -> str:
    """A text about arguments in Python as one about options of the command line.

    Example:
        >>> in_options("'a' is no layer; head=None switches it off; or neurons={'W': 'columns'}")
        "'a' is no layer; --head none switches it off; or --neurons 'W=columns'"
    """
    for pattern, options in _OPTIONS:
        text = re.sub(pattern, options, text)
    return text


def complain(message: str) -> None:
    """Print an error, without control characters and not too long, since it may quote a file."""
    print("lightning-hsu: " + bounded(message), file=sys.stderr)


def bounded(message: str) -> str:
    """A message whose words and lines are not too long, without control characters.

    Example:
        >>> len(bounded("no layer " + 5000 * "a"))
        209
    """
    lines = []
    for line in message.split("\n"):
        words = [shorten(printable(word), _LONGEST_WORD) for word in line.split(" ")]
        lines.append(shorten(" ".join(words), _LONGEST_LINE))
    return "\n".join(lines)
