"""Errors of pinet_fast: each message says what, where, what was expected, what came, and a fix."""

from __future__ import annotations


class PinetError(Exception):
    """Base class of every error that pinet_fast raises on purpose."""


class InputError(PinetError, ValueError):
    """A file, option or argument given by the user is wrong; the command line exits with code 2."""


class DataError(InputError):
    """A log, store or batch cannot be used as it is."""


class StoreError(DataError):
    """A store file is missing, damaged, foreign, or changed since it was written."""


class StrataError(InputError):
    """Strata are ill-defined: an empty stratum, an id out of range, a wrong count."""


class ConfigError(InputError):
    """A run option, or a combination of options, is invalid."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class AggregationError(PinetError, RuntimeError):
    """Stratum gradients cannot be computed or used as asked."""


class BoundaryError(AggregationError):
    """A parameter meets rows of the batch in a function that has no rule."""


class RowLayoutError(AggregationError):
    """It cannot be told which dimension of a tensor holds the rows of the batch."""


class StratumLeakError(AggregationError):
    """The loss of one stratum reaches the gradient attributed to another one."""


class BackendUnavailableError(PinetError, RuntimeError):
    """A kernel backend that was asked for cannot serve."""


class TrainingInterrupted(PinetError):
    """Training was stopped by a signal after a checkpoint was written."""
