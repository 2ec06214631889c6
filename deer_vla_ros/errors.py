"""Which errors are the user's to solve?"""


class UserError(Exception):
    """Something the person at the terminal can put right.

    The message is one line and names the value, the limit and the remedy. The command line prints it as it is and
    exits with status 1; any other exception is a defect of ours and keeps its traceback.
    """
