"""How our ends of an HTTP/2 connection begin: with windows and frames that never hold a peer up."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings

_WINDOW = (1 << 31) - 1  # the most that HTTP/2 allows: who sends too much is held up by TCP
_FRAME_BYTES = (1 << 24) - 1  # the most that HTTP/2 allows
_MOST_STREAMS = 100  # of a client


def connection(is_client: bool) -> H2Connection:
    """What h2 keeps of a connection, with its first words said; they wait in it to be sent."""
    made = H2Connection(H2Configuration(client_side=is_client))
    values = {
        SettingCodes.INITIAL_WINDOW_SIZE: _WINDOW,
        SettingCodes.MAX_FRAME_SIZE: _FRAME_BYTES,
        SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
    }
    values |= {SettingCodes.ENABLE_PUSH: 0} if is_client else {SettingCodes.MAX_CONCURRENT_STREAMS: _MOST_STREAMS}
    made.local_settings = Settings(client=is_client, initial_values=values)
    made.max_inbound_frame_size = _FRAME_BYTES
    made.initiate_connection()
    made.increment_flow_control_window(_WINDOW - made.inbound_flow_control_window)
    return made
