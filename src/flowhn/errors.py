"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input: a configuration, data file, checkpoint or device that cannot be used as asked.

    The message is one sentence that names the key and says how to mend it. Command-line entries print it without a
    traceback and exit with code 2 (``debug=true`` shows the traceback).
    """
