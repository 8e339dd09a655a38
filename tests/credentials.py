"""What the processes of a test's cluster show each other. Needs no torch."""

from __future__ import annotations

from workers.transport.grpc.credentials import Credentials

CREDENTIALS = Credentials("the token of the tests")

#: How long a health check may take in tests about something else: their servers share a process, and a busy machine.
PATIENT_S = 20.0
