"""The errors of this program: the user's mistakes, and failures beyond the user's control."""


class UserError(ValueError):
    """A mistake in a setting, a file or a command: shown as one line, with exit code 2.

    The message names the setting or the file and says what would be right.
    """


class SharedError(UserError):
    """A mistake found alike on all ranks of a run that are connected, so only one reports it."""


class RunError(RuntimeError):
    """The run cannot go on, though its settings are right: shown as one line, with exit code 1."""
