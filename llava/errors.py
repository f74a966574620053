"""Errors a user can act on: each says what is wrong, where, and what to do."""


class LlavaError(Exception):
    """Base of the errors this package raises on purpose; the command line prints them without a traceback."""


class ConfigError(LlavaError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ImageError(LlavaError, ValueError):
    """A file or array that is not a usable image; the message names it."""


class CheckpointError(LlavaError, ValueError):
    """Weights that do not fit the model; the message lists the keys."""


class DataError(LlavaError, ValueError):
    """A record, list or caption file with a fault; the message names file and line."""


class MissingDependencyError(LlavaError, ImportError):
    """An optional package is needed and absent; the message says which extra brings it."""


class DownloadError(LlavaError, OSError):
    """Weights could not be fetched or found; the message says what was tried."""
