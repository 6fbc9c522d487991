"""The one error of this package."""

from __future__ import annotations

import errno


class WeightsError(RuntimeError):
    """Weights that cannot be found, fetched, trusted, read or fitted to a model.

    The message is one line: what was asked for, what went wrong, how to go on.
    """


def reason(error: BaseException, limit: int = 300) -> str:
    """The class and the message of `error` in one line.

    Args:
        error: Any exception.
        limit: Longest answer, in characters.
    """
    text = " ".join(str(error).split()).rstrip(".")
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def is_disk_error(error: BaseException) -> bool:
    """Whether the local disk failed (full, not writable, a quota) rather than the network.

    Args:
        error: Any exception.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
    return isinstance(error, OSError) and error.errno in codes
