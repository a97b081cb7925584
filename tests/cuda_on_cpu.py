# SPDX-License-Identifier: Apache-2.0
"""torch's own kernels of CUDA tensors, on the CPU: where there is CUDA's library of the
tests, which runs no kernels but ours.

What a test does with tensors beside our operators is done on copies of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# They make, share or copy memory, and need no kernel for it.
_KEPT = ("empty", "_empty", "resize", "set_", "record_stream", "_local_scalar", "_copy")


def _operators() -> Iterator[tuple[str, torch._ops.OpOverload]]:
    """What torch has kernels for, by name within "aten"; not what makes views."""
    for full in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        space, _, name = full.partition("::")
        packet, _, overload = name.partition(".")
        if space != "aten" or packet == "copy_" or packet.startswith(_KEPT):
            continue
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        shared = [it.alias_info for it in operator._schema.returns if it.alias_info]
        if all(it.is_write for it in shared):
            yield name, operator


def _on_cpu(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    written = [
        (place, argument.name)
        for place, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    def run(*args: Any, **kwargs: Any) -> Any:
        device = torch.device("cuda", torch.cuda.current_device())

        def to_cpu(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                return _on_host(value)[1]
            is_ours = isinstance(value, torch.device) and value.type == "cuda"
            return torch.device("cpu") if is_ours else value

        cpu_args, cpu_kwargs = pytree.tree_map(to_cpu, (args, kwargs))
        result = operator(*cpu_args, **cpu_kwargs)
        if not written:
            return pytree.tree_map_only(Tensor, lambda it: it.to(device), result)
        outputs = []
        for place, name in written:
            of = (args, cpu_args) if place < len(args) else (kwargs, cpu_kwargs)
            key = place if place < len(args) else name
            target, values = (it[key] for it in of)
            for to, value in zip(
                *map(pytree.tree_leaves, (target, values)), strict=True
            ):
                if to.shape != value.shape:
                    to.resize_(value.shape)
                to.copy_(value)
            outputs.append(target)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return run


def _copy(kernel: Any) -> Callable[..., Tensor]:
    """copy_, of which copies of memory as it is are left to the library."""

    def run(
        keys: Any, to: Tensor, source: Tensor, non_blocking: bool = False
    ) -> Tensor:
        plain = to.is_contiguous() and source.is_contiguous()
        if plain and (to.dtype == source.dtype or to.is_cuda != source.is_cuda):
            return kernel.call_boxed(keys, to, source, non_blocking)
        if plain and to.dtype == torch.int32 and source.dtype == torch.int64:
            return _enqueue("automoeNarrow", to, source)
        memory, values = _on_host(to)
        values.copy_(_on_host(source)[1])
        if to.is_cuda:
            _bytes_of(to).copy_(memory)
        return to

    return run


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole memory that a tensor is a view of."""
    of = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return of.set_(tensor.untyped_storage())


def _on_host(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """That memory on the CPU, and the tensor in it."""
    if not tensor.is_cuda:
        return tensor, tensor
    memory = _bytes_of(tensor).cpu()
    view = torch.empty(0, dtype=tensor.dtype).set_(
        memory.untyped_storage(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )
    return memory, view


# ---- what graphs have: done by the library, in the order of the stream ----


def _enqueue(name: str, to: Tensor, source: Tensor | None, *more: Any) -> Tensor:
    getattr(ctypes.CDLL(None), name)(
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        ctypes.c_void_p(to.data_ptr()),
        ctypes.c_void_p(None if source is None else source.data_ptr()),
        ctypes.c_size_t(to.numel()),
        *more,
    )
    return to


def _serves(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    return tensor.is_contiguous() and tensor.dtype in dtypes


def _scale(to: Tensor, source: Tensor | None, factor: float) -> Tensor:
    number = ctypes.c_double(factor)
    return _enqueue("automoeScale", to, source, to.element_size(), number)


def _multiply(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(one: Tensor, other: Tensor | float) -> Tensor:
        if isinstance(other, Tensor) or not _serves(one, *_SCALED):
            return on_cpu(one, other)
        return _scale(torch.empty_like(one), one, other)

    return run


def _fill(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(to: Tensor, value: float) -> Tensor:
        return _scale(to, None, value) if _serves(to, *_SCALED) else on_cpu(to, value)

    return run


def _clamp(on_cpu: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        source: Tensor, min: float | None = None, max: float | None = None
    ) -> Tensor:
        if min is None or max is None or not _serves(source, torch.int64):
            return on_cpu(source, min, max)
        limits = ctypes.c_int64(min), ctypes.c_int64(max)
        return _enqueue("automoeClamp", torch.empty_like(source), source, *limits)

    return run


_SCALED = (torch.float32, torch.bfloat16)
_IN_GRAPHS = {"mul.Tensor": _multiply, "fill_.Scalar": _fill, "clamp": _clamp}


def _sleep(cycles: int) -> None:
    """The current stream does nothing for so many cycles of 200 MHz: the host is slow,
    too."""
    library = ctypes.CDLL(None)
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    microseconds = ctypes.c_void_p(cycles // 200)
    library.cudaLaunchHostFunc(stream, library.usleep, microseconds)


def install() -> torch.library.Library:
    """Put them in the place of torch's, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    for name, operator in _operators():
        run = _IN_GRAPHS.get(name, lambda it: it)(_on_cpu(operator))
        library.impl(name, run, "CUDA", allow_override=True)
    copy = _copy(torch.library.get_kernel("aten::copy_", "CUDA"))
    library.impl("copy_", copy, "CUDA", with_keyset=True, allow_override=True)
    torch.cuda._sleep = _sleep
    return library
