"""What a command needs of the process it runs in, whoever started it: streams, a directory, libraries that may warn."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import MutableMapping

# By Python without options.
_IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def set_up() -> None:
    """Before anything else: see the functions here."""
    open_closed_streams()
    # A terminal need not know every character of a help page, or of what a model says.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        os.getcwd()
    except FileNotFoundError:  # somebody removed it; libraries that ask where they are end the process
        os.chdir("/")
    let_libraries_warn(os.environ)


def open_closed_streams() -> None:
    """Put the null device where stdin, stdout or stderr is closed, for this process and those that it starts.

    The next file or socket would get the number of a closed one, and whatever is printed with it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: most likely this one
            if null == number:
                os.set_inheritable(null, True)
            setattr(sys, name, open(null, mode, encoding="utf-8"))  # noqa: SIM115


def let_libraries_warn(environ: MutableMapping[str, str]) -> None:
    """Show warnings that are to be errors (PYTHONWARNINGS=error): Ray and others warn of themselves, and the processes
    that import them would end."""
    if any(action.split(":")[0].strip() == "error" for action in environ.get("PYTHONWARNINGS", "").split(",")):
        del environ["PYTHONWARNINGS"]
        warnings.resetwarnings()
        for each in _IGNORED:
            warnings.simplefilter("ignore", each)
        print(
            "note: PYTHONWARNINGS makes errors of warnings, and libraries warn of themselves; it is not followed",
            file=sys.stderr,
        )
