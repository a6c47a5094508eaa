"""A mistake of whoever uses pedyra, told in one line: the value, the rule, the repair."""


class UserError(ValueError):
    """What was given cannot be done, and the message says what to give instead.

    The command line prints it and ends with exit code 2. Any other exception is a fault of the code, here or in a
    library below, and keeps its traceback.
    """
