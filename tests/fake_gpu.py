"""A GPU that is not there: tensors that say they are on `cuda:0`, lie in host memory, and refuse what a GPU does.

Host and device tensors that meet in one operation, a host tensor that is given to a kernel, a device tensor that NumPy
is to read: on a CPU all of that works, and on a GPU it ends a request. With Triton's interpreter the branches that only
a GPU takes run whole. It has no streams (everything is done at once) and no graphs (`captures` computes anew).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from workers.kernels.cuda.launch import capability
from workers.kernels.cuda.layer_experts import _reading
from workers.kernels.cuda.ops import CudaOps
from workers.kernels.cuda.tiles import card
from workers.kernels.ops import Ops
from workers.model.decode_graphs import DecodeGraphs

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_FACTORIES = ("empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "randint", "rand", "randn")
_TOTAL_BYTES = 1 << 33
_to = Tensor.to
#: Operations that take tensors of both sides.
_TAKE_BOTH = frozenset((Tensor.copy_, Tensor.to, Tensor.cpu, Tensor.__getitem__))


class OnGpu(Tensor):
    """A tensor on the GPU."""

    device, is_cuda, is_cpu = GPU, True, False  # type: ignore[assignment]

    def numpy(self, **options: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __array__(self, *dtype: object) -> Any:
        return self.numpy()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.cpu:
            return _off(args[0]).clone()
        if function not in _TAKE_BOTH:
            _check(function, args, kwargs)
        where = _named(args[1:], kwargs) if function is Tensor.to else _named((), kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*_each(args, _plain), **_each(kwargs, _plain))
        if where is not None and where.type == "cpu":
            return result.clone() if function is Tensor.to else result
        if function is Tensor.copy_ or function is Tensor.__getitem__:
            return _on(result) if isinstance(args[0], OnGpu) else result
        return _each(result, _on)


def _check(function: Any, args: Any, kwargs: Any) -> None:
    """Raise what a GPU's operation does when it is given a tensor of the host, but for numbers and what is an index."""
    if function is Tensor.__setitem__:
        by_tensor = any(True for _ in _tensors(args[1]))
        strangers = _hosts(args[2]) if by_tensor else []  # a slice is copied to
    else:
        strangers = _hosts((args, kwargs))
    if strangers:
        raise RuntimeError(
            f"{function.__name__}: expected all tensors to be on the same device, cuda:0 and cpu were given"
        )


def _hosts(value: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(value) if not isinstance(tensor, OnGpu) and tensor.dim()]


def _named(args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call asks for."""
    for each in (*args, kwargs.get("device")):
        if isinstance(each, Tensor):
            return each.device
        if isinstance(each, torch.device) or (isinstance(each, str) and each.startswith(("cpu", "cuda"))):
            return torch.device(each)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with all that is in it changed, tuples with names among it."""
    if isinstance(value, dict):
        return {name: _each(each, change) for name, each in value.items() if name != "pin_memory"}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        changed = [_each(each, change) for each in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return change(value)


def _off(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, OnGpu) else value


def _plain(value: Any) -> Any:
    """As a CPU takes it."""
    is_gpu = (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )
    return _CPU if is_gpu else _off(value)


def _on(value: Any) -> Any:
    return value.as_subclass(OnGpu) if isinstance(value, Tensor) and not isinstance(value, OnGpu) else value


class _Stream:
    """Whatever it is given is done already. Also what it records, and the block in which it is the current one."""

    def __init__(self, device: object = None, priority: int = 0) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self) -> _Stream:
        return self

    def query(self) -> bool:
        return True


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One GPU of 8 GiB, for every thread."""

    def made(make: Any) -> Any:
        def factory(*args: Any, **kwargs: Any) -> Any:
            result = make(*_each(args, _plain), **_each(kwargs, _plain))
            where = _named((), kwargs)
            return _on(result) if where is not None and where.type == "cuda" else result

        return factory

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        where = _named(args, kwargs)
        if isinstance(self, OnGpu) or where is None or where.type == "cpu":
            return _to(self, *args, **kwargs)
        copied: Tensor = _on(_to(self, *_each(args, _plain), **_each(kwargs, _plain)).clone())
        return copied

    for name in _FACTORIES:
        monkeypatch.setattr(torch, name, made(getattr(torch, name)))
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "pin_memory", Tensor.clone)
    properties = SimpleNamespace(uuid="0", name="GPU")
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "current_stream": _Stream, "Stream": _Stream, "stream": lambda stream: stream,
        "synchronize": lambda device=None: None, "graph_pool_handle": object, "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (_TOTAL_BYTES, _TOTAL_BYTES), "memory_reserved": lambda device=None: 0,
        "get_device_name": lambda device=None: "GPU", "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (0, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    grid: Any = import_module("triton.runtime.interpreter").GridExecutor
    launch = grid.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if any(not isinstance(tensor, OnGpu) for tensor in _tensors((args, kwargs))):
            raise ValueError(f"pointer argument of {self.fn.__name__} cannot be accessed from Triton (cpu tensor?)")
        launch(self, *_each(args, _off), **_each(kwargs, _off))

    monkeypatch.setattr(grid, "__call__", launched)
    for known in (capability, card, _reading):
        known.cache_clear()
    yield
    for known in (capability, card, _reading):
        known.cache_clear()


class _Graph:
    """What was captured: computed again, with the results where the first ones are."""

    def __init__(self, function: Callable[[Ops], Tensor], ops: Callable[[], Ops], result: Tensor) -> None:
        self._function, self._ops, self._result = function, ops, result

    def replay(self) -> None:
        self._result.copy_(self._function(self._ops()))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing without graphs: what is captured is what was computed last."""
    computed: list[Tensor] = []
    compute = DecodeGraphs._compute

    def computes(self: DecodeGraphs, *args: Any) -> Tensor:
        computed[:] = [compute(self, *args)]
        return computed[0]

    def capture(self: CudaOps, function: Callable[[Ops], Tensor]) -> tuple[_Graph, Tensor]:
        def fresh() -> CudaOps:  # what operations keep of a step is computed anew by a replay
            return CudaOps(self.device, self.dtype, self._live, self._most_items)

        return _Graph(function, fresh, computed[0]), computed[0]

    monkeypatch.setattr(DecodeGraphs, "_compute", computes)
    monkeypatch.setattr(CudaOps, "capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
