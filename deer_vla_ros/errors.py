"""Which errors are the user's to solve, and how any error is told in one line."""


class UserError(Exception):
    """Something the person at the terminal can put right.

    The message is one line and names the value, the limit and the remedy. The command line prints it as it is
    and exits with status 1; any other exception is a defect of ours and keeps its traceback.
    """


def one_line(error: BaseException) -> str:
    """What to tell of an error in a log: a UserError's own words, else its type and the beginning of its
    message."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
