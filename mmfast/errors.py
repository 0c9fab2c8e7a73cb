"""The one error that is a user's to mend."""


class UserError(ValueError):
    """Bad input, told in one line that names the thing, what was got and what was wanted.

    The command prints the message and exits with 1; from Python it is an ordinary ``ValueError``.
    """
