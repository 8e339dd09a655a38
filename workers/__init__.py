"""Everything that touches tensors: checkpoints, kernels, the dense model, expert shards and transports."""
