"""A process that ends while threads wait in kernels for messages that never come: catches memory that the interpreter
frees under them, which would make a segmentation fault of a good end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[5]
LEAVES_WAITING = """
import builtins, time
import workers.kernels.cpu.system as system
from tests.contract.harness import ShmWorkers
from tests.contract.test_losses import GIVEN, MODEL, TWICE, exchange_over
from tests.contract.test_results import run

class Slow:  # goes last, when the modules are gone: waiting threads wake up meanwhile
    def __del__(self, sleep=time.sleep):
        taken = [bytearray(64) for _ in range(200_000)]
        sleep(0.4)

kept = [(workers, exchange_over(workers, TWICE)) for workers in map(ShmWorkers, [MODEL] * 3)]
for _, exchange in kept:
    run(exchange, GIVEN)
system.last = Slow()  # freed with what the kernels are told of the C library
builtins.slow = Slow()
print("waits")
"""


def test_threads_that_wait_in_kernels_survive_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVES_WAITING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "waits\n"), done.stderr
