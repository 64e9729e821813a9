"""A base class whose instances export somebody else's buffer.

Python 3.12 lets a class written in Python do this with ``__buffer__`` (PEP 688). Python 3.11
does not, so there the base class is made through the C API: its one slot is the function with
which ``pickle.PickleBuffer`` passes a request for its buffer on to the object it wraps. That
function reads the object from the second word after the header, which is where ``__slots__``
puts ``_b_target``, and raises ValueError when it is empty. 3.11 gets security fixes only, so
that layout is final; ``tests/test_region.py`` checks it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING or sys.version_info >= (3, 12):

    class Exporter:
        """Exports the buffer of ``_b_target``; without one, ValueError."""

        __slots__ = ("_b_target",)
        _b_target: memoryview

        def __buffer__(self, flags: int) -> memoryview:
            try:
                return memoryview(self._b_target)
            except AttributeError:
                raise ValueError("the region is closed") from None

else:
    import ctypes
    import pickle

    class _Slot(ctypes.Structure):
        _fields_ = [("slot", ctypes.c_int), ("function", ctypes.c_void_p)]

    class _Spec(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p),
            ("basicsize", ctypes.c_int),
            ("itemsize", ctypes.c_int),
            ("flags", ctypes.c_uint),
            ("slots", ctypes.POINTER(_Slot)),
        ]

    def _forwarding_type() -> type:
        bf_getbuffer = 1
        default_and_basetype = 1 << 18 | 1 << 10
        get_slot = ctypes.pythonapi.PyType_GetSlot
        get_slot.restype = ctypes.c_void_p
        get_slot.argtypes = [ctypes.py_object, ctypes.c_int]
        from_spec = ctypes.pythonapi.PyType_FromSpec
        from_spec.restype = ctypes.py_object
        slots = (_Slot * 2)((bf_getbuffer, get_slot(pickle.PickleBuffer, bf_getbuffer)), (0, None))
        name = b"mshare.buffer.Forwarding"
        spec = _Spec(name, object.__basicsize__, 0, default_and_basetype, slots)
        return from_spec(ctypes.byref(spec))

    class Exporter(_forwarding_type()):
        """Exports the buffer of ``_b_target``; without one, ValueError."""

        __slots__ = ("_a_unused", "_b_target")
