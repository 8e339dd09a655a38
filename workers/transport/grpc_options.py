"""What both ends of an Exchange stream agree on: its name, its limits, how a silent peer is noticed."""

from __future__ import annotations

from workers.wire import FRAME_BYTES

EXPERTS_SERVICE = "expertmesh.experts.v1.Experts"
EXCHANGE_METHOD = f"/{EXPERTS_SERVICE}/Exchange"
DESCRIBE_METHOD = f"/{EXPERTS_SERVICE}/Describe"

_WINDOW_BYTES = 16 << 20
_HTTP2_FRAME_BYTES = (1 << 24) - 1  # the most that HTTP/2 allows
_KEEPALIVE_S = 10
_KEEPALIVE_ANSWER_S = 5

_BOTH = (
    (b"grpc.max_receive_message_length", FRAME_BYTES),
    (b"grpc.max_send_message_length", FRAME_BYTES),
    # A message of many frames goes out without waiting for the peer to say how much it can take.
    (b"grpc.http2.lookahead_bytes", _WINDOW_BYTES),
    (b"grpc.http2.max_frame_size", _HTTP2_FRAME_BYTES),
    (b"grpc.keepalive_time_ms", _KEEPALIVE_S * 1000),
    (b"grpc.keepalive_timeout_ms", _KEEPALIVE_ANSWER_S * 1000),
    (b"grpc.keepalive_permit_without_calls", 1),
    (b"grpc.http2.max_pings_without_data", 0),
)

CLIENT_OPTIONS = (
    *_BOTH,
    # A channel of its own for every stream: a worker that comes back is not kept waiting by an old one's back-off.
    (b"grpc.use_local_subchannel_pool", 1),
    (b"grpc.enable_retries", 0),
    (b"grpc.enable_http_proxy", 0),
)

SERVER_OPTIONS = (
    *_BOTH,
    (b"grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_S * 500),
    # A second server on the same port is an error, not a coin toss.
    (b"grpc.so_reuseport", 0),
)
