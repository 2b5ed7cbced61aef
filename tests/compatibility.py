"""The README's table of what each mode does where: ``python -m tests.compatibility`` prints it, ``--write`` puts it there."""

import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
MODES = ("gradient", "loss", "decoupled")


def table(situations):
    """Markdown, one line a text; rows that share one must agree."""
    lines = {}
    for row in situations:
        cells = [*(getattr(row, mode).cell for mode in MODES), row.kept]
        if row.text is not None and lines.setdefault(row.text, cells) != cells:
            raise ValueError(
                f"{row.name!r} does not agree with the others of {row.text!r}: {cells}"
            )
    rows = [
        ("situation", *MODES, "`tolerance`"),
        ("---",) * 5,
        *((text, *cells) for text, cells in lines.items()),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def split_readme():
    """The README before the table, the table, and what follows; None without the marks."""
    before, begin, rest = README.read_text().partition(BEGIN)
    part, end, after = rest.partition(END)
    return (before, part.strip(), after) if begin and end else None


def write(text):
    before, _, after = split_readme()
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main():
    from tests.test_exactness import SITUATIONS

    text = table(SITUATIONS)
    if "--write" not in sys.argv[1:]:
        print(text)
    elif split_readme() is None:
        sys.exit(f"README.md needs the lines {BEGIN} and {END}")
    else:
        write(text)


if __name__ == "__main__":
    main()
