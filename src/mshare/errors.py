"""The exceptions mshare raises: the built-in ``OSError`` family, with errno and a name.

``OSError(ENOENT, …)`` is a ``FileNotFoundError`` by itself, and so on: Python picks the
subclass from the errno. A value that no machine would accept is a ``ValueError`` too.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

RUN_OUT = frozenset(
    (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
)
"""What a call fails with when the machine, or a limit, has no more of something."""


class InvalidValue(OSError, ValueError):
    """A bad name, size, offset, shape or mode: an ``OSError`` with errno, and a ``ValueError``."""


def invalid(message: str, thing: object, code: int = errno.EINVAL) -> InvalidValue:
    """The exception for a value that is wrong on any machine; ``thing`` is what was wrong."""
    return InvalidValue(code, message, thing)


def unsupported(what: str, engine: str, able: str, name: str) -> OSError:
    """EOPNOTSUPP for what an engine can't do, naming the engines that can."""
    message = f"engine '{engine}' can't {what} ({able} can)"
    return OSError(errno.EOPNOTSUPP, message, name)


def no_locked_file(name: str) -> OSError:
    """EOPNOTSUPP for a file in a locked region."""
    why = "whoever may write to a file can take its pages away"
    cure = "make a locked region of that size, and copy the content into it"
    return OSError(errno.EOPNOTSUPP, f"a file can't be locked: {why}; {cure}", name)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Name the region in the error of a call that ran out of something on its way."""
    try:
        yield
    except OSError as error:
        if error.errno not in RUN_OUT or error.filename == name:
            raise
        raise OSError(error.errno, error.strerror, name) from error


class Gone:
    """What is unpickled in place of a region, or an array, that can't be attached.

    Whatever is done with it raises why. Unpickling itself must not: ``multiprocessing.Pool`` takes
    an OSError there for the end of its pipe, and the task, or all results, are lost without a word.
    """

    _error: OSError

    def __init__(self, error: OSError) -> None:
        self.__dict__["_error"] = error

    def _raise(self, *_: object, **__: object) -> NoReturn:
        raise self._error.with_traceback(None)

    __getattr__ = __setattr__ = __enter__ = __exit__ = __buffer__ = __array__ = _raise
    __getitem__ = __setitem__ = __len__ = __iter__ = __bool__ = __float__ = __int__ = _raise
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _raise
    __truediv__ = __rtruediv__ = __neg__ = __lt__ = __le__ = __gt__ = __ge__ = _raise

    def __reduce__(self) -> tuple[type[Gone], tuple[OSError]]:
        return Gone, (self._error,)
