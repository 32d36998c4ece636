"""Exceptions that a caller may catch. Each is also a ``ValueError``, ``RuntimeError`` or ``ImportError``."""


class MediatorError(Exception):
    """Any error of this library that a caller can cause and mend."""


class ConfigError(MediatorError, ValueError):
    """A setting is unknown, out of range, or contradicts another."""


class CheckpointError(MediatorError, ValueError):
    """A checkpoint is missing, damaged, or holds weights that cannot be used (NaN, infinity)."""


class CheckpointMismatchError(CheckpointError):
    """Base and experts do not belong together."""


class AdapterError(MediatorError, ValueError):
    """A saved adapter is incomplete, damaged or of another format version."""


class BackboneMismatchError(AdapterError):
    """An adapter meets a backbone other than the one it was built on."""


class OutputExistsError(MediatorError, ValueError):
    """The output folder is already there."""


class OutputError(MediatorError, RuntimeError):
    """The output cannot be written: the disk is full, or the folder is read-only."""


class OutOfMemoryError(MediatorError, RuntimeError):
    """The work does not fit into the memory it may use."""


class RoutingError(MediatorError, ValueError):
    """Expert weights, names or calibration data cannot be used."""


class RouterNotFittedError(MediatorError, RuntimeError):
    """Routing was asked for before the router was fitted."""


class UnsupportedError(MediatorError, RuntimeError):
    """A combination that this library refuses rather than compute something else."""


class MissingPackageError(MediatorError, ImportError):
    """An optional package is needed and not installed."""
