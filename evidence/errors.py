"""What the harness says where it cannot go on."""


class MissingDataError(Exception):
    """The data asked for is not there; the message says what to do."""
