"""The dispatcher ops: their names in Python, their fake kernels, and what stands in for autograd.

The ops themselves have no derivative: `logits.py` pairs a forward with its backward op. An op
that is called on its own with something that requires grad raises here, since the dispatcher's
default is to return, with a warning at most, a result whose gradient is silently missing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import _torch_private
from .._arguments.validate import loss_dtype


class Executor(enum.IntEnum):
    """Who computes an op's products on CUDA: as the plan says, our kernels, or the library."""

    AUTO = 0
    FUSED = 1
    LIBRARY = 2


def split(flat: Sequence[Any], modalities: int, masks: int = 0) -> tuple[Any, Any, Any, Any]:
    """Takes a flat sequence apart: features, weights, as many biases, and masks."""
    last = len(flat) - masks
    middle = (modalities + last) // 2
    return flat[:modalities], flat[modalities:middle], flat[middle:last], flat[last:]


# By name, as `register` fills it: a lookup in torch.ops costs 5 us where it is cold.
_overloads: dict[str, Callable[..., list[Tensor]]] = {}


def call(name: str, executor: Executor, like: Tensor, *args: Any) -> list[Tensor]:
    """Calls an op from inside an autograd.Function, where no gradient can be lost.

    `like` is one of the features: on its device the op runs.
    """
    op = _overloads[name]
    if not like.is_cuda:
        return _call(op, *args) if executor == 0 else _call(op, *args, False, int(executor))
    allow_tf32 = like.dtype == torch.float32 and _tf32_allowed()
    return _call(op, *args, allow_tf32, int(executor))


def scale_gradients(grads: Sequence[Tensor], scale: Tensor, to_float16: bool) -> list[Tensor]:
    """Returns a step's gradients times `scale`, float32 ones as float16 where that is asked."""
    return _call(torch.ops.dgl_ext.scale_gradients.default, grads, scale, to_float16)


def scale_gradients_(grads: Sequence[Tensor], scale: Tensor) -> None:
    """Multiplies a step's gradients by `scale` in place."""
    _call(torch.ops.dgl_ext.scale_gradients_.default, grads, scale)


def _call(op: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
    """Goes past the checking kernels below, which would cost 5 us a call."""
    if torch.compiler.is_compiling():  # Dynamo does not trace the guard
        return op(*args)
    try:
        with _torch_private.below_autograd():
            return op(*args)
    except RuntimeError as error:
        # Through the stable ABI every error is a RuntimeError.
        if type(error) is RuntimeError and str(error).startswith("CUDA out of memory"):
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _register(
    name: str, fake: Callable[[SimpleNamespace], Any], library: torch.library.Library
) -> None:
    torch.library.register_fake(f"dgl_ext::{name}", _fake_kernel(name, fake), lib=library)
    overload = _overloads[name] = getattr(torch.ops.dgl_ext, name).default

    def refuse_autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(
                f"dgl_ext::{name} is not differentiable on its own: call dgl_ext.fused_decouple. "
                "For second derivatives, and for exported programs that are trained, use "
                'backend="reference".'
            )
        with _torch_private.below_autograd():
            return overload.redispatch(keyset & _torch_private.after_autograd, *args)

    if _torch_private.after_autograd is not None:
        library.impl(name, refuse_autograd, "Autograd", with_keyset=True)
    if not name.endswith("_"):
        _register_batched(name, overload, library)
    if name.startswith("scale_gradients"):  # no Tensor?[] there
        return

    def resolve(*args: Any) -> Any:
        return overload(*[_resolved(arg) for arg in args])

    # PyTorch's own kernels for these keys pass by the entries of a Tensor?[], which then lose
    # their sign, or are read where there is no storage.
    for key in ("Negative", "ZeroTensor"):
        library.impl(name, resolve, key)


def _register_batched(name: str, op: Callable[..., Any], library: torch.library.Library) -> None:
    """Has an op called once for each of a batch of gradients, as of a vectorized Jacobian.

    PyTorch's rules for lists of optional tensors do not do it, in neither of its two vmaps.
    """

    def call_each(size: int, dims: Any, args: Any) -> list[Tensor]:
        each = [op(*_taken(args, dims, i)) for i in range(size)]
        return [torch.stack(tensors) for tensors in zip(*each, strict=True)]

    def of_func(info: Any, dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
        results = call_each(info.batch_size, dims, args)
        return results, [0] * len(results)

    def of_autograd(*args: Any) -> list[Tensor]:  # grad(..., is_grads_batched=True)
        level = _torch_private.enter_vmap() - 1
        _torch_private.leave_vmap()
        sizes: list[int] = []

        def unwrap(arg: Any) -> Any:
            if not _torch_private.is_batched(arg):
                return arg
            opened = _torch_private.remove_batch(arg, level, 1, 0)
            sizes.append(opened.shape[0])
            return opened

        dims = _torch_private.tree_map(
            lambda arg: 0 if _torch_private.is_batched(arg) else None, args
        )
        opened = _torch_private.tree_map(unwrap, args)
        return [_torch_private.add_batch(r, 0, level) for r in call_each(sizes[0], dims, opened)]

    torch.library.register_vmap(f"dgl_ext::{name}", of_func, lib=library)
    if _torch_private.enter_vmap is not None:
        library.impl(name, of_autograd, "Batched")


def _taken(arg: Any, dim: Any, i: int) -> Any:
    """Returns the arguments of the i-th call of a batch, which are batched along `dim`."""
    if isinstance(dim, (list, tuple)):
        return [_taken(entry, d, i) for entry, d in zip(arg, dim, strict=True)]
    return arg if dim is None else arg.select(dim, i)


def _resolved(arg: Any) -> Any:
    """Returns an op's argument with its lazy negations done and its zeros written to memory."""
    if isinstance(arg, (list, tuple)):
        return [_resolved(entry) for entry in arg]
    if not isinstance(arg, Tensor):
        return arg
    return torch.zeros_like(arg) if arg._is_zerotensor() else arg.resolve_neg()


def arguments_of(name: str, args: Sequence[Any]) -> SimpleNamespace:
    """Returns an op's arguments by the names that its schema has for them."""
    names = [argument.name for argument in _overloads[name]._schema.arguments]  # type: ignore[attr-defined]
    return SimpleNamespace(**dict(zip(names, args, strict=False)))


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Returns the tensors among an op's arguments, those in lists too."""
    flat = chain.from_iterable(arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return [arg for arg in flat if isinstance(arg, Tensor)]


def _fake_kernel(name: str, fake: Callable[[SimpleNamespace], Any]) -> Callable[..., Any]:
    """Has a fake kernel check what a real one does: with one meta tensor, only this one runs."""

    def checked(*args: Any) -> Any:
        tensors = _tensors(args)
        for tensor in tensors[1:]:
            if tensor.device != tensors[0].device:
                raise RuntimeError(
                    f"dgl_ext::{name}: expected all tensors on {tensors[0].device} as the first, "
                    f"got one on {tensor.device}"
                )
        return fake(arguments_of(name, args))

    return checked


def _logits(call: SimpleNamespace) -> list[Tensor]:
    like = call.features[0]
    shape = (*like.shape[:-1], call.weights[-1].shape[0])
    return [like.new_empty(shape) for _ in range(len(call.features) + 1)]


def _film_head_forward(call: SimpleNamespace) -> list[Tensor]:
    like = call.features[0]
    # gamma and beta, kept for backward in the dtype that they were computed in.
    shape = (*like.shape[:-1], call.weights[0].shape[0])
    return [*_logits(call), like.new_empty(shape, dtype=loss_dtype(like))]


def _head_backward(call: SimpleNamespace) -> list[Tensor]:
    """Contiguous empty gradients of what is needed: features, then weights, then biases."""
    needed = list(zip(call.features, call.needs_features, strict=True))
    needed += list(zip(call.weights, call.needs_weights, strict=True))
    shapes = [tensor.shape for tensor, need in needed if need]
    shapes += [w.shape[:1] for w, need in zip(call.weights, call.needs_biases, strict=True) if need]
    return [call.features[0].new_empty(shape) for shape in shapes]


def _head_step(call: SimpleNamespace) -> list[Tensor]:
    like, branches = call.features[0], len(call.features) + 1
    dtype = loss_dtype(like)
    grads = _head_backward(call)
    if like.dtype == torch.float16:  # they wait for the upstream scale in float32
        grads = [grad.new_empty(grad.shape, dtype=dtype) for grad in grads]
    rows = (branches, *like.shape[:-1])
    return [
        like.new_empty((), dtype=dtype),
        like.new_empty((branches,), dtype=dtype),
        *(like.new_empty((branches,), dtype=torch.int64) for _ in ("correct", "count")),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(rows, dtype=torch.int64),
        *grads,
    ]


def _scale_gradients(call: SimpleNamespace) -> list[Tensor]:
    half = torch.float16 if call.to_float16 else None
    return [grad.new_empty(grad.shape, dtype=half or grad.dtype) for grad in call.grads]


FAKE_KERNELS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "linear_head_forward": _logits,
    "linear_head_backward": _head_backward,
    "linear_head_step": _head_step,
    "film_head_forward": _film_head_forward,
    "film_head_backward": _head_backward,
    "film_head_step": _head_step,
    "scale_gradients": _scale_gradients,
    "scale_gradients_": lambda call: None,
}


def register() -> torch.library.Library:
    """Completes the ops that the extension has defined; to be kept alive with the package."""
    library = torch.library.Library("dgl_ext", "IMPL")
    for name, fake in FAKE_KERNELS.items():
        _register(name, fake, library)
    return library


def _tf32_allowed() -> bool:
    """Whether float32 products on CUDA may be tf32, as `torch.backends.cuda.matmul` says."""
    return bool(_torch_private.matmul_precision("cuda", "matmul") == "tf32")


# Dynamo takes the answer for a constant; its guards see the setting change.
_tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
