"""ggml's products on CPUs (llama.cpp), by the libraries that the package llama-cpp-python has in it. They have no Python interface but ctypes."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from smoothquant_plus.errors import InputError
from smoothquant_plus.evaluation.peers import Product, Weights

# ggml_type, how many input channels a block has, and whether weights are repacked for the product on x86.
TYPES = {"Q4_0": (2, 32, True), "Q8_0": (8, 32, False), "Q4_K": (12, 256, True)}
FLOAT32 = 0
OVERHEAD = 1 << 20  # bytes, more than what a context says of its tensors and its graph

Pointer = ctypes.c_void_p
SILENCE = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)(lambda *_: None)  # what it says of each weight


class Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool))


# What is called, with what it returns.
FUNCTIONS: dict[str, object] = {
    **dict.fromkeys(("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"), Pointer),
    **dict.fromkeys(("ggml_backend_alloc_ctx_tensors", "ggml_backend_alloc_ctx_tensors_from_buft"), Pointer),
    **dict.fromkeys(("ggml_backend_cpu_init", "ggml_backend_cpu_reg"), Pointer),
    **dict.fromkeys(("ggml_backend_reg_dev_get", "ggml_backend_reg_get_proc_address"), Pointer),
    **dict.fromkeys(("ggml_build_forward_expand", "ggml_backend_tensor_set", "ggml_backend_cpu_set_n_threads"), None),
    **dict.fromkeys(("ggml_free", "ggml_backend_buffer_free", "ggml_log_set"), None),
    **dict.fromkeys(("ggml_quantize_chunk", "ggml_row_size"), ctypes.c_size_t),
    "ggml_backend_buft_name": ctypes.c_char_p,
    "ggml_backend_graph_compute": ctypes.c_int,
}


@functools.cache
def functions() -> dict[str, Callable[..., int]]:
    """FUNCTIONS, to be called with pointers as ints, all other arguments as ctypes."""
    spec = find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    libraries = [
        ctypes.CDLL(str(Path(spec.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL) for name in ("libggml-base.so", "libggml-cpu.so")
    ]
    found = {}
    for name, result in FUNCTIONS.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype = result
        found[name] = function
    found["ggml_log_set"](SILENCE, None)
    return found


def ggml(kind: str) -> Callable[[Weights], Product]:
    """A row of TYPES. It rounds the weight itself, in blocks, as a model's file has it, and the activations to 8 bits, in blocks too; where it has a
    layout of its own for the product, the weight is repacked."""

    def build(weights: Weights) -> Product:
        f = functions()
        number, block, repacked = TYPES[kind]
        n, k = weights.floats.shape
        if k % block:
            raise InputError(f"{kind} has blocks of {block} input channels, which do not divide {k}")
        floats, size = weights.floats.float().contiguous(), f["ggml_row_size"](number, ctypes.c_int64(k))
        integers = torch.empty(n * size, dtype=torch.uint8)
        context = Context()  # before anything is quantized: the first one fills ggml's tables
        f["ggml_quantize_chunk"](number, *_pointers(floats, integers), ctypes.c_int64(0), ctypes.c_int64(n), ctypes.c_int64(k), None)
        weight = context.tensor(number, k, n)
        context.allocate(_repacked() if repacked else None)
        f["ggml_backend_tensor_set"](Pointer(weight), *_pointers(integers), ctypes.c_size_t(0), ctypes.c_size_t(len(integers)))

        def bind(x: Tensor) -> Callable[[], Tensor]:
            own, values = Context(), x.float().contiguous()
            inputs = own.tensor(FLOAT32, k, len(x))
            output = f["ggml_mul_mat"](Pointer(own.pointer), Pointer(weight), Pointer(inputs))
            graph = f["ggml_new_graph"](Pointer(own.pointer))
            f["ggml_build_forward_expand"](Pointer(graph), Pointer(output))
            own.allocate(None)
            f["ggml_backend_tensor_set"](Pointer(inputs), *_pointers(values), ctypes.c_size_t(0), ctypes.c_size_t(values.nbytes))
            memory = (ctypes.c_float * (len(x) * n)).from_address(f["ggml_get_data"](Pointer(output)))
            y = torch.frombuffer(memory, dtype=torch.float32).reshape(len(x), n)

            def call(kept: object = (context, own)) -> Tensor:
                f["ggml_backend_cpu_set_n_threads"](Pointer(_backend()), torch.get_num_threads())
                if f["ggml_backend_graph_compute"](Pointer(_backend()), Pointer(graph)):
                    raise RuntimeError("ggml could not compute the product")
                return y

            return call

        return bind

    return build


class Context:
    """Some tensors of ggml, and their memory. It is freed with this object."""

    def __init__(self) -> None:
        self.pointer = functions()["ggml_init"](Parameters(OVERHEAD, None, True))
        weakref.finalize(self, functions()["ggml_free"], Pointer(self.pointer))

    def tensor(self, kind: int, columns: int, rows: int) -> int:
        return functions()["ggml_new_tensor_2d"](Pointer(self.pointer), kind, ctypes.c_int64(columns), ctypes.c_int64(rows))

    def allocate(self, kind_of_buffer: int | None) -> None:
        """Memory for all the tensors; without a kind of buffer the backend's own."""
        f = functions()
        if kind_of_buffer is None:
            buffer = f["ggml_backend_alloc_ctx_tensors"](Pointer(self.pointer), Pointer(_backend()))
        else:
            buffer = f["ggml_backend_alloc_ctx_tensors_from_buft"](Pointer(self.pointer), Pointer(kind_of_buffer))
        weakref.finalize(self, f["ggml_backend_buffer_free"], Pointer(buffer))


@functools.cache
def _backend() -> int:
    return functions()["ggml_backend_cpu_init"]()


@functools.cache
def _repacked() -> int | None:
    """The kind of buffer that repacks weights, if this build has it."""
    f = functions()
    registry = f["ggml_backend_cpu_reg"]()
    device = f["ggml_backend_reg_dev_get"](Pointer(registry), ctypes.c_size_t(0))
    address = f["ggml_backend_reg_get_proc_address"](Pointer(registry), b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(device)
    for kind in iter(iter(kinds).__next__, None):  # the last one is null
        if b"REPACK" in bytes(f["ggml_backend_buft_name"](Pointer(kind))):
            return int(kind)
    return None


def _pointers(*tensors: Tensor) -> list[Pointer]:
    return [Pointer(tensor.data_ptr()) for tensor in tensors]
