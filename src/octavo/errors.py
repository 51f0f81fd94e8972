"""Every error a user can meet, as one tree.

OctavoError
├── ConfigError            a setting has an impossible value
├── ModelError
│   ├── ModelNotFoundError     no such folder, file or hub id, or it cannot be read
│   ├── UnsupportedModelError  the model lacks a seam Octavo needs; the message names it
│   └── NotAttachedError       an attached model was expected
├── AdapterError
│   ├── AdapterFileError       missing, truncated, tampered or of an unknown format
│   └── AdapterMismatchError   made for another model
├── InputError
│   ├── PromptError            empty, longer than the model's positions, or no prompt
│   ├── TextFileError          a text file that cannot be read
│   └── OutputFileError        a file or folder that cannot be written
├── CacheError
│   ├── CacheBudgetError       the byte budget cannot hold the next tokens; nothing was written
│   ├── CacheStateError        what was asked for needs tokens that are already evicted, or another model's cache
│   ├── SnapshotFileError      a snapshot is missing, damaged or of an unknown format
│   └── ReuseFileError         a file of a reuse cache is damaged or of an unknown format
├── RetrofitError              training cannot start or go on
│   └── RetrofitInterrupted    stopped by the user; a checkpoint was written
└── VectorDatabaseError        something is wrong with a vector database or what it was asked
    ├── VectorError            a vector of another dimension, dtype or layout, or with NaN or infinity
    ├── UnknownIdError         no row has this id or index
    ├── DuplicateIdError       a row has this id already
    ├── DatabaseClosedError    the database was closed
    ├── ReadOnlyDatabaseError  a view of a file cannot be changed
    └── DatabaseFileError      the file is missing, damaged or cannot be written
"""


class OctavoError(Exception):
    """Root of all errors that Octavo raises on purpose."""


class ConfigError(OctavoError, ValueError):
    """A setting has an impossible value."""


class ModelError(OctavoError):
    """Something is wrong with the model itself."""


class ModelNotFoundError(ModelError):
    """No such folder, file or hub id, or it cannot be read."""


class UnsupportedModelError(ModelError):
    """The model lacks a seam that Octavo needs; the message names it."""


class NotAttachedError(ModelError):
    """An attached model was expected (see `octavo.attach`)."""


class AdapterError(OctavoError):
    """Something is wrong with an adapter."""


class AdapterFileError(AdapterError):
    """The adapter is missing, truncated, tampered with or of an unknown format."""


class AdapterMismatchError(AdapterError):
    """The adapter was made for another model."""


class InputError(OctavoError, ValueError):
    """The user's text or tokens cannot be used."""


class PromptError(InputError):
    """The prompt is empty, longer than the model's positions, or none that the model could read."""


class TextFileError(InputError):
    """A text file cannot be read."""


class OutputFileError(InputError):
    """A file or folder cannot be written."""


class CacheError(OctavoError):
    """Something is wrong with a KV cache."""


class CacheBudgetError(CacheError):
    """The byte budget cannot hold the next tokens; the cache is as it was."""


class CacheStateError(CacheError):
    """The cache cannot do this in its present state; it is as it was."""


class SnapshotFileError(CacheError):
    """A snapshot is missing, damaged or of an unknown format."""


class ReuseFileError(CacheError):
    """A file of a reuse cache is damaged or of an unknown format; what it held is computed again."""


class RetrofitError(OctavoError):
    """Training cannot start or go on."""


class RetrofitInterrupted(RetrofitError):
    """Training was stopped by the user; the message names the checkpoint."""


class VectorDatabaseError(OctavoError, RuntimeError):
    """Something is wrong with a vector database or what it was asked; the database is as it was."""


class VectorError(VectorDatabaseError, ValueError):
    """A vector has another dimension, dtype or layout than the database needs, or holds NaN or infinity."""


class UnknownIdError(VectorDatabaseError, KeyError):
    """No row has this id or index."""

    __str__ = Exception.__str__  # KeyError's would put the message into quotes


class DuplicateIdError(VectorDatabaseError, ValueError):
    """A row has this id already; nothing was added."""


class DatabaseClosedError(VectorDatabaseError):
    """The database was closed."""


class ReadOnlyDatabaseError(VectorDatabaseError):
    """The database is a view of a file and cannot be changed."""


class DatabaseFileError(VectorDatabaseError):
    """The file of a database is missing, damaged or cannot be written."""
