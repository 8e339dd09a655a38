"""A lock that threads of Python and kernels share: the C library's."""

from __future__ import annotations

import ctypes


class Mutex:
    """What `threading.Lock` offers a `with`, at an address that kernels can be given. Not reentrant."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_int64 * 16)()  # more than a pthread_mutex_t takes anywhere
        self.address = ctypes.addressof(self._memory)
        _WAITS.pthread_mutex_init(self.address, None)

    def acquire(self, *, blocking: bool = True) -> bool:
        """Whether it is held now."""
        if _BRIEF.pthread_mutex_trylock(self.address) == 0:
            return True
        return blocking and _WAITS.pthread_mutex_lock(self.address) == 0

    def release(self) -> None:
        """By the thread that holds it."""
        _BRIEF.pthread_mutex_unlock(self.address)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


_WAITS, _BRIEF = ctypes.CDLL(None), ctypes.PyDLL(None)  # without the GIL, and with it
for _functions in (_WAITS, _BRIEF):
    _functions.pthread_mutex_init.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    for _name in ("lock", "trylock", "unlock"):
        getattr(_functions, f"pthread_mutex_{_name}").argtypes = (ctypes.c_void_p,)
