"""Errors a user can mend. Entry points print their message on one line and exit with code 2."""


class UserError(ValueError):
    """Bad input: the message names what is wrong, where, and how to mend it."""


class ConfigError(UserError):
    """A configuration field, argument or configuration file is wrong."""


class DataError(UserError):
    """A dataset, shard or record is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, damaged or does not fit the run."""
