"""A command in a terminal of its own, as a person runs it."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import termios
from contextlib import suppress


def run_in_terminal(*command: str, environ: dict[str, str], until: str) -> str:
    """What `command` writes to a terminal of 120 by 50, which sends Ctrl-C once `until` is there. It ends with 0."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command,
        env={**environ, "COLUMNS": "120", "LINES": "50", "TERM": "xterm"},
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(end)
    written, asked = "", False
    with suppress(OSError):  # the terminal is gone with the process
        while data := os.read(terminal, 65536):
            written += data.decode(errors="replace")
            if until in written and not asked:
                asked = True
                os.write(terminal, b"\x03")
    os.close(terminal)
    assert process.wait(30) == 0, written
    return written
