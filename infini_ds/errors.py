"""What a user can get wrong, and what goes wrong by itself."""


class UserError(ValueError):
    """A mistake in a setting, a file or a command: shown as one line, exit code 2.

    The message names the setting or the file and says what would be right.
    """


class SharedError(UserError):
    """The same on all ranks of a run, which have met: one of them tells it."""


class RunError(RuntimeError):
    """The run cannot go on, through no mistake in its settings: shown as one line, exit code 1."""
