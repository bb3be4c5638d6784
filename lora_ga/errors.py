"""The one exception for things the user can fix."""


class SetupError(Exception):
    """A wrong setting, a missing or damaged file: one line that says what is wrong and names the fix."""
