"""Triton's interpreter, made quick: what it does anew for every call of a function is done once for a test module."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """It replaces the words of Triton's language with its own, several hundred, for every call of every function that a
    kernel calls: nearly half of its time. And it checks the sums of integers for overflow, which Philox means. It knows
    one program at a time, so threads take turns."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    before = np.seterr(all="ignore")  # tens of thousands of warnings otherwise: infinities, and what wraps
    patch, builder, scopes = interpreter._patch_lang, interpreter.interpreter_builder, {}
    options = builder.options

    def once(function: Any) -> Any:
        if (words := names.get(function)) is None:
            seen = function.__globals__.values()
            words = names[function] = frozenset(id(each) for each in seen if any(each is module for module in modules))
        if words not in scopes:
            scopes[words] = patch(function)
        return interpreter._LangPatchScope()  # with nothing to restore

    launch, turn = interpreter.GridExecutor.__call__, threading.Lock()

    def launched(self: Any, *args: Any, **options: Any) -> None:
        with turn:
            launch(self, *args, **options)

    names: dict[Any, frozenset[int]] = {}
    modules = (interpreter.tl, interpreter.tl.core)
    interpreter._patch_lang, builder.options = once, replace(options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = launched
    yield
    interpreter.GridExecutor.__call__ = launch
    np.seterr(**before)
    interpreter._patch_lang, builder.options = patch, options
    for scope in reversed(scopes.values()):
        scope.restore()
