"""The one exception for things the user can fix, and the exit code that asks to be started again."""

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: told to stop, nothing lost, the same command goes on


class SetupError(Exception):
    """A wrong setting, a missing or damaged file: one line that says what is wrong and names the fix."""
