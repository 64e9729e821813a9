"""The exceptions mshare raises: the built-in ``OSError`` family, with errno and a name.

``OSError(ENOENT, …)`` is a ``FileNotFoundError`` by itself, and so on: Python picks the
subclass from the errno. A value that no machine would accept is a ``ValueError`` too.
"""

from __future__ import annotations

import errno


class InvalidValue(OSError, ValueError):
    """A bad name, size, offset, shape or mode: an ``OSError`` with errno, and a ``ValueError``."""


def invalid(message: str, thing: object, code: int = errno.EINVAL) -> InvalidValue:
    """The exception for a value that is wrong on any machine; ``thing`` is what was wrong."""
    return InvalidValue(code, message, thing)


def unsupported(what: str, engine: str, able: str, name: str) -> OSError:
    """EOPNOTSUPP for what an engine can't do, naming the engines that can."""
    message = f"engine '{engine}' can't {what} ({able} can)"
    return OSError(errno.EOPNOTSUPP, message, name)
