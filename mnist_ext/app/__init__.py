"""The MNIST application, made with the library; the library imports nothing of it.

Its rooms import downwards only: ``cli`` on top, then ``report`` and ``bench``, then ``runs``,
``training``, ``data`` and ``files``.
"""


class UserError(Exception):
    """Wrong use or bad input.

    The message is one line that says what is wrong and what to do about it. The command line
    prints it after ``mnist-ext: error:`` and exits with code 2.
    """
