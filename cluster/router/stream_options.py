"""What both ends of a generation stream agree on: limits, and how a silent peer is noticed."""

from __future__ import annotations

# Prompts and their log-probabilities are the largest messages: 32k tokens with 20 candidates each take 8 MB.
_MESSAGE_BYTES = 64 * 1024 * 1024
# A peer that hangs, or whose machine is gone without a word, is noticed within the sum of both.
_PING_EVERY_MS = 5000
_PING_ANSWER_MS = 5000

_BOTH = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_ANSWER_MS),
    # Where an answer to another ping is already awaited, this limit counts instead, and its default is a minute.
    ("grpc.http2.ping_timeout_ms", _PING_ANSWER_MS),
    ("grpc.http2.max_pings_without_data", 0),
]

SERVER_OPTIONS = [
    *_BOTH,
    ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second listener
]

CLIENT_OPTIONS = [
    *_BOTH,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a router that comes back does not wait for an older link's back-off
    ("grpc.enable_http_proxy", 0),
]
