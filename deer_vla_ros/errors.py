"""The error that a user can solve, the end of cancelled work, and one line of text for any error or value."""

import reprlib


class UserError(Exception):
    """An error that the person at the terminal can solve.

    The message is one line and names the value, the limit and the remedy. The command line prints the message
    and exits with status 1. Any other exception is a defect of this package and keeps its traceback.
    """


class Cancelled(Exception):
    """Work was given up before its end, because somebody asked for that. The message says who."""


def one_line(error: BaseException) -> str:
    """One line for a log: a UserError's message, or another error's type and first 300 characters."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


def cause(error: BaseException) -> str:
    """The first 200 characters of an error's message on one line, for a UserError's text; its type if it has
    no message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shown(value: object) -> str:
    """A value as an error's text shows it: the first 100 characters of its representation.

    Of nested values only the beginning is looked at: the whole can be endless in a file that somebody forged.
    """
    try:
        text = _BEGINNING.repr(value)
    except ValueError:  # Python writes no decimal numbers of over 4300 digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= 100 else f"{text[:100]}..."


class _Beginning(reprlib.Repr):
    """The beginning of a value's representation, made without the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = 10
        self.maxlong = 5000

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[:101])

    def repr_instance(self, value: object, level: int) -> str:
        if isinstance(value, (str, bytes)):
            return repr(value[:101])
        # Arrays, queues and the like
        return f"a value of type {type(value).__name__}" if hasattr(value, "__len__") else repr(value)


_BEGINNING = _Beginning()
