"""What a user sees when something is wrong: one message that says what was given, where, what is allowed, what to do.

Every class carries the exit code of the command. Anything else that escapes is a bug of Kiem and keeps its traceback.
"""


class KiemError(Exception):
    """A problem that the user can act on. The message is complete: it is printed without a traceback."""

    exit_code = 1


class KiemWarning(UserWarning):
    """Something that the user should know and that stops nothing. It is said even to those who asked for quiet."""


class ConfigError(KiemError):
    """A configuration, option or argument that cannot be used. Holds every problem found, one a line."""

    exit_code = 2


class DataError(KiemError):
    """Text, shards or a tokenizer that cannot be read or used."""

    exit_code = 3


class CheckpointError(KiemError):
    """A checkpoint or run folder that is missing, damaged, or belongs to another configuration."""

    exit_code = 4


class NumericsError(KiemError):
    """A loss, gradient or state that is not finite. The weights are those before the refused update."""

    exit_code = 5


class BusyError(KiemError):
    """The run folder is being written by another process."""

    exit_code = 6


class StorageError(KiemError):
    """The disk is full or cannot be written. What was complete before is untouched."""

    exit_code = 7


class Stopped(KiemError):
    """The run was asked to stop (Ctrl-C or SIGTERM), has saved, and says how to resume it."""

    exit_code = 130
