"""Checks of what a user passes in: a message names the argument, what was expected, what came.

They run where the ops' own do not suffice (`functional.py`). They read attributes and compare,
never touch a tensor's data, and make text only on the way out. Wrong types and dtypes raise
`TypeError`, everything else `ValueError`.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Collection, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from .. import _torch_private

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Of class indices; the ops take the first.
INDEX_DTYPES = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32),
)

_LAZY = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
_LARGEST = sys.float_info.max

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_OR_NONE = _PLAIN | {type(None)}

Shape = tuple[int | None, ...]


def check_tensor(name: str, value: object) -> Tensor:
    """Returns `value` if it is a dense floating-point tensor of a supported dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, _LAZY):
        raise ValueError(
            f"{name}: expected a tensor with a shape, got an {type(value).__name__}: "
            "call its lazy module once before"
        )
    if value.dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name}: expected one of {names}, got {value.dtype}")
    check_dense(name, value)
    return value


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises unless every entry of `tensor` is there, and has a place of its own."""
    # torch.masked.MaskedTensor, which is not imported with torch
    if tensor.layout is torch.strided and not tensor.is_nested and not hasattr(tensor, "get_mask"):
        return
    got = "a nested tensor" if tensor.is_nested else str(tensor.layout)
    if hasattr(tensor, "get_mask"):
        got = f"a {type(tensor).__name__} (`present` takes masks of rows)"
    raise TypeError(f"{name}: expected a dense (torch.strided) tensor, got {got}")


def check_sequence(name: str, value: object, what: str) -> tuple[object, ...]:
    """Returns `value` as a tuple if it is a list, a tuple or another sequence, but not a tensor."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    # torch.nn.ParameterList is not a Sequence, but has all that one needs; a tensor would be
    # cut along its batch in silence.
    if (
        isinstance(value, (Tensor, str))
        or hasattr(value, "keys")
        or not (hasattr(value, "__len__") and hasattr(value, "__getitem__"))
    ):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    return tuple(value[i] for i in range(len(value)))


def check_length(name: str, values: Sized, count: int, what: str) -> None:
    """Raises unless there are `count` values; in the message `what` follows on that number."""
    if len(values) != count:
        raise ValueError(f"{name}: expected {count}{what}, got {len(values)}")


def plain_tuple(value: object, or_none: bool = False) -> tuple[Any, ...] | None:
    """Returns the entries of a list or tuple if all are tensors (or None, if so asked), else None.

    A parameter is a tensor like any other; no other subclass passes, which may make of an op what
    it will.
    """
    if not isinstance(value, (list, tuple)):
        return None
    values = tuple(value)
    return values if (_PLAIN_OR_NONE if or_none else _PLAIN).issuperset(map(type, values)) else None


def is_foreign(value: object) -> bool:
    """Whether `value` is a tensor that acts for itself, as DTensor and torchao's do.

    The ops know nothing of such subclasses, but for those of torch.compile.
    """
    if type(value) in _PLAIN or not isinstance(value, Tensor):
        return False
    acts = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    ours = _torch_private.FakeTensor, _torch_private.FunctionalTensor
    return acts and not isinstance(value, ours)


def check_tensors(features: object) -> tuple[Tensor, ...]:
    """Returns the features as a tuple of tensors, one per modality."""
    values = check_sequence("features", features, "a sequence of tensors, one per modality")
    if not values:
        raise ValueError("features: expected at least one tensor, got none")
    return tuple(check_tensor(f"features[{i}]", value) for i, value in enumerate(values))


def check_features(features: object) -> tuple[Tensor, ...]:
    """Returns the features as a tuple: one tensor per modality, equal leading shape."""
    tensors = check_tensors(features)
    leading = tensors[0].shape[:-1]
    for i, tensor in enumerate(tensors):
        if not tensor.dim():
            raise ValueError(f"features[{i}]: expected shape (..., D), got a scalar")
        if tensor.shape[:-1] != leading:
            raise ValueError(
                f"features[{i}]: expected leading shape {tuple(leading)} as features[0], "
                f"got {tuple(tensor.shape[:-1])}"
            )
    return tensors


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Returns the dtype that autocast asks for on this kind of device, or None outside autocast."""
    # "meta" has no such setting. (torch 2.10 cannot trace torch.amp.is_autocast_available.)
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Casts as autocast does for `nn.Linear`: float64 stays what it is."""
    if dtype is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def check_parameter(name: str, value: object, dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """Returns a weight or bias, cast to `dtype` if there is one, if it then is like `like`."""
    if (
        dtype is None
        and isinstance(value, Tensor)
        and type(value) in _PLAIN
        and value.dtype is like.dtype
        and value.device == like.device
        and value.layout is torch.strided
    ):
        return value
    tensor = cast(check_tensor(name, value), dtype)
    check_like(name, tensor, like)
    return tensor


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises unless `tensor` has the dtype and device of `like`, which is `features[0]`."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} as features[0], got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as features[0], got {tensor.device}"
        )


def check_shape(name: str, tensor: Tensor, expected: Shape) -> None:
    """Raises unless the shape is `expected`, where `None` stands for C, any number of outputs."""
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) != len(expected) or any(
        want is not None and want != size for want, size in zip(expected, shape, strict=True)
    ):
        sizes = ["C" if size is None else str(size) for size in expected]
        text = ", ".join(sizes) + ("," if len(sizes) == 1 else "")
        raise ValueError(f"{name}: expected shape ({text}), got {tuple(shape)}")


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """Returns `value` if it is one of the names that there are."""
    if isinstance(value, str) and value in choices:
        return value
    names = ", ".join(f'"{choice}"' for choice in choices)
    raise ValueError(f"{name}: expected one of {names}, got {value!r}")


def check_width(name: str, value: object) -> int:
    """Returns a layer's width as an int if it is a positive integer."""
    width = _check_int(name, value)
    if width < 1:
        raise ValueError(f"{name}: expected a positive int, got {width}")
    return width


def check_share(name: str, value: object) -> float:
    """Returns a leak, or another share, as a float if it is a number in [0, 1]."""
    value = _plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {type(value).__name__}")
    if not 0 <= value <= 1:  # true of NaN, too
        raise ValueError(f"{name}: expected a number in [0, 1], got {shown(value)}")
    return float(value)


def check_masks(present: object, features: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Returns one bool tensor, or None, per modality; of what shapes is for the caller to check."""
    if present is None:  # not nothing: exported programs lose an empty list of optional tensors
        return (None,) * len(features)
    masks = check_sequence("present", present, "a sequence of bool tensors, one per modality")
    check_length("present", masks, len(features), " entries, one per modality")
    for i, (mask, feature) in enumerate(zip(masks, features, strict=True)):
        if mask is None:
            continue
        name = f"present[{i}]"
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name}: expected a bool tensor or None, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: expected torch.bool, got {mask.dtype}")
        check_dense(name, mask)
        if mask.device != feature.device:
            raise ValueError(f"{name}: expected device {feature.device}, got {mask.device}")
    return masks  # type: ignore[return-value]


def check_present(present: object, features: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Returns one bool tensor of the leading shape, or None, per modality."""
    masks = check_masks(present, features)
    leading = features[0].shape[:-1]
    for i, mask in enumerate(masks):
        if mask is not None and mask.shape != leading:
            raise ValueError(
                f"present[{i}]: expected shape {tuple(leading)}, the features' leading shape, "
                f"got {tuple(mask.shape)}"
            )
    return masks


def loss_dtype(like: Tensor) -> torch.dtype:
    """Returns the dtype of losses and of their weights for features like `like`."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def check_target(target: object, like: Tensor, classes: int) -> Tensor:
    """Returns class indices as int64, of the leading shape of `like`, or soft targets.

    Indices are checked where they are read: by the kernels.
    """
    if not isinstance(target, Tensor):
        raise TypeError(
            f"target: expected a tensor of classes or probabilities, got {type(target).__name__}"
        )
    if target.dtype in DTYPES:
        return _check_constant("target", target, like, (*like.shape[:-1], classes))
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            "target: expected integer class indices, torch.int64 at most, or floating "
            f"probabilities, got {target.dtype}"
        )
    return _check_constant("target", target, like, like.shape[:-1]).long()


def check_weight(name: str, weight: object, like: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Returns class or sample weights in the loss's dtype, or None."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(weight).__name__}")
    if weight.dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {weight.dtype}")
    return _check_constant(name, weight, like, shape).to(loss_dtype(like))


def _check_constant(name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    """Returns `tensor` if it is dense, on the features' device, of that shape, without gradient."""
    check_dense(name, tensor)
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as features[0], got {tensor.device}"
        )
    if tensor.shape != tuple(shape):
        # (..., C), or the classes alone
        what = ", the features' leading shape" if tuple(shape) == like.shape[:-1] else ""
        raise ValueError(f"{name}: expected shape {tuple(shape)}{what}, got {tuple(tensor.shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor without gradient, since none is computed for it: "
            "detach() it"
        )
    return tensor


def check_alpha(alpha: object, modalities: int) -> tuple[float, ...]:
    """Returns one weight per modality from a number for all, or a sequence of one for each."""
    alpha = _plain_number(alpha)
    if isinstance(alpha, (int, float)) and not isinstance(alpha, bool):
        return (_check_finite("alpha", alpha),) * modalities
    values = check_sequence("alpha", alpha, "a number, or a sequence of one per modality")
    check_length("alpha", values, modalities, " numbers, one per modality")
    return tuple(_check_finite(f"alpha[{i}]", value) for i, value in enumerate(values))


def _plain_number(value: object) -> object:
    """Returns NumPy's numbers and tensors of one number as Python's, all else as it is."""
    if type(value) in (int, float, bool):
        return value
    if isinstance(value, Tensor):
        # Of fake tensors and other subclasses none may have a value.
        single = type(value) in _PLAIN and value.dim() == 0 and value.dtype != torch.bool
        return value.item() if single else value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return (
        float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value
    )


def _check_int(name: str, value: object) -> int:
    number = _plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return number


def _check_finite(name: str, value: object) -> float:
    value = _plain_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # math.isfinite cannot be traced where torch.compile takes the number for a variable, and
    # overflows where an int does.
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
    return float(value)


def shown(value: float) -> str:
    """Returns a number as text; Python refuses to write out an int of thousands of digits."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"an int of {value.bit_length()} bits"
    return str(value)


def check_per_output(name: str, value: object, modalities: int) -> tuple[Callable[..., Any], ...]:
    """Returns one function per output, fused first, from one for all, or a sequence of them."""
    if callable(value):
        return (value,) * (modalities + 1)
    functions = check_sequence(name, value, "a function or a sequence of them")
    what = " functions, for the fused output and one per modality"
    check_length(name, functions, modalities + 1, what)
    for k, function in enumerate(functions):
        if not callable(function):
            raise TypeError(f"{name}[{k}]: expected a function, got {type(function).__name__}")
    return functions  # type: ignore[return-value]


def check_names(names: object, modalities: int) -> tuple[str, ...]:
    """Returns one name per modality; made up ones where there are none."""
    if names is None:
        return tuple(f"modality_{i}" for i in range(modalities))
    values = () if isinstance(names, str) else check_sequence("names", names, "a sequence of str")
    if isinstance(names, str) or not all(isinstance(name, str) for name in values):
        raise TypeError(f"names: expected a sequence of str, got {names!r}")
    check_length("names", values, modalities, ", one per modality")
    if len({*values, "fused", "total"}) < modalities + 2:
        raise ValueError(f'names: expected each once, and no "fused" or "total", got {names!r}')
    return values  # type: ignore[return-value]


def check_loss(name: str, loss: object) -> Tensor:
    """Returns `loss` if it is a tensor of one element."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"{name}: expected a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"{name}: expected a scalar tensor, got shape {tuple(loss.shape)}")
    return loss


def check_ignore_index(value: object) -> int:
    """Returns `ignore_index` if it is an int that fits the target's dtype."""
    number = _check_int("ignore_index", value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {shown(number)}")
    return number
