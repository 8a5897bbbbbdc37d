"""The one exception that stands for a mistake the user can mend."""


class UserError(Exception):
    """Wrong use or bad input.

    The message is one line that says what is wrong and what to do about it. The command line
    prints it after ``mnist-ext: error:`` and exits with code 2.
    """
