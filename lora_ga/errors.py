"""The one exception for things the user can fix, and the exit code that is no error."""

REQUEUE = 75  # EX_TEMPFAIL: a run that was told to stop has kept its checkpoint and wants to be started again


class SetupError(Exception):
    """A wrong setting, a missing or damaged file: one line that says what is wrong and names the fix."""
