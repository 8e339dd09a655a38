"""Comparisons with other engines and with bare transports, run by hand: `python -m benchmarks.NAME`."""
