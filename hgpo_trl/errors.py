"""The exception that tells a user what to change."""


class UserError(ValueError):
    """Something that the user gave does not fit: a field, a file, a data set, a model.

    The message names the field, the value and the remedy. The commands print it without a traceback and exit with
    status 2; any other exception is a fault of the program and keeps its traceback.
    """
