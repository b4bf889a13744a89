"""Errors that end a program, each with the exit code users script against (design: 2 configuration, 3 data, 4 loss).

They carry one line that names what was wrong, the value seen and the way out; launchers print it without a traceback.
"""


class RoentgenError(Exception):
    """Base of every error that a user can cause or mend; `exit_code` is what the launcher returns."""

    exit_code = 1


class ConfigError(RoentgenError):
    """Bad arguments, recipe, credentials or paths: nothing was started."""

    exit_code = 2


class DataError(RoentgenError):
    """Data that cannot be used: a broken manifest or shard, or more void slots than allowed."""

    exit_code = 3


class BadSampleError(DataError):
    """One sample that cannot be used; the loader makes it a void slot. `key` is already hashed for adopted sets."""

    def __init__(self, shard: str, key: str, cause: str) -> None:
        super().__init__(f"shard {shard}, sample {key}: {cause}")
        self.shard, self.key, self.cause = shard, key, cause

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # crosses process borders
        return type(self), (self.shard, self.key, self.cause)


class EmptyReportError(DataError):
    """A study without a word in the report sections the recipe reads; the loader makes it a void slot."""


class StoreUnreachableError(DataError):
    """The store did not answer after all retries. Never answered by skipping samples."""


class MissingObjectError(DataError):
    """A file or object that was named, by a manifest or a user, is not in the store."""


class StoreFullError(DataError):
    """No room left where something had to be written; what was there before is untouched."""


class NonFiniteError(RoentgenError):
    """The loss or the gradient norm is NaN or infinite; raised on all ranks before the optimizer moves."""

    exit_code = 4
    sample_ids: tuple[int, ...] | list[int] = ()  # with bad embeddings, else of the whole batch
