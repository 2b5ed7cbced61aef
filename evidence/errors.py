"""What the harness says where it cannot go on."""


class MissingDataError(Exception):
    """The data asked for is not there; the message says what to do."""


def unusable(out: str, error: OSError) -> str:
    """What is said where results cannot be written or read."""
    return f"{error}\n{out} cannot be used: make room, or name another --out"
