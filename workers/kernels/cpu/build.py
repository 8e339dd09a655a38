"""`python -m workers.kernels.cpu.build FILE`: compile the CPU kernels for this machine into one object file.

numba turns each kernel into LLVM code; a plain entry `expertmesh_NAME(args)` takes the place of numba's wrapper, which
would tie the code to a process with numba in it; the whole is written as machine code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
from numba import types

from workers.kernels.cpu.compiled import answer, attention, dense, dispatch, products, ring, serve, steps

_ENTRY = """
declare i32 @"{native}"(ptr, ptr, i64)
define void @expertmesh_{name}(i64 %args) {{
  %result = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{native}"(ptr %result, ptr %error, i64 %args)
  ret void
}}
"""


def main(path: Path) -> None:
    """Write the object file, all at once."""
    whole = llvm.parse_assembly("")
    for module in (answer, attention, dense, dispatch, products, ring, serve, steps):
        for function in module.KERNELS:
            whole.link_in(_module(function))
    host = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, reloc="pic", jit=True
    )
    whole.triple = host.triple
    _drop_unused(whole, host)
    unknown = [f.name for f in whole.functions if f.is_declaration and not f.name.startswith("llvm.")]
    if unknown:
        raise RuntimeError(f"kernels call functions outside themselves: {unknown}")
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(host.emit_object(whole))
    part.replace(path)


def _module(function: Any) -> Any:
    """The LLVM module of one kernel, with its entry."""
    compiled = numba.cfunc(types.void(types.int64), nopython=True, error_model="numpy")(function)
    module = llvm.parse_bitcode(compiled._library._final_module.as_bitcode())
    wrapper = compiled.native_name
    native = wrapper.removeprefix("cfunc.")
    module.link_in(llvm.parse_assembly(_ENTRY.format(native=native, name=function.__name__)))
    module.get_function(wrapper).linkage = "internal"
    module.get_function(native).linkage = "internal"
    return module


def _drop_unused(module: Any, host: Any) -> None:
    """Remove numba's wrappers and what only they need."""
    for function in module.functions:
        if not function.is_declaration and not function.name.startswith("expertmesh_"):
            function.linkage = "internal"
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(host, llvm.create_pipeline_tuning_options()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
