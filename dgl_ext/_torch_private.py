"""Every private name of PyTorch that the package uses, each with a public stand-in.

A release may rename them. Then the stand-in is slower, or gives a corner up, and all else goes on:
`FALLBACKS` says what each would be.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

FALLBACKS: dict[str, Any] = {}


def _resolve(name: str, path: str, fallback: Any) -> Any:
    """Returns what lies at `path`, a module and a name in it, or else the fallback."""
    FALLBACKS[name] = fallback
    module, _, attribute = path.rpartition(".")
    try:
        found: Any = torch._C if module == "torch._C" else importlib.import_module(module)
        return functools.reduce(getattr, attribute.split(":"), found)
    except (ImportError, AttributeError):
        return fallback


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(function, entry) for entry in tree)
    if isinstance(tree, dict):
        return {key: _map(function, entry) for key, entry in tree.items()}
    return function(tree)


class _Never:
    """A kind of tensor that there is none of."""


# Past the kernels that check for autograd; within an autograd.Function they find nothing anyway.
below_autograd = _resolve("below_autograd", "torch._C._AutoDispatchBelowAutograd", torch.no_grad)
# Whether the backward pass that runs keeps its graph: then nothing may be written in place.
keeps_graph = _resolve(
    "keeps_graph", "torch._C._autograd:_get_current_graph_task_keep_graph", lambda: True
)
under_transforms = _resolve(
    "under_transforms", "torch._C._are_functorch_transforms_active", lambda: False
)
tree_map = _resolve("tree_map", "torch.utils._pytree.tree_map", _map)
register_namedtuple = _resolve(
    "register_namedtuple",
    "torch.utils._pytree._register_namedtuple",
    lambda cls, *, serialized_type_name: None,
)
FakeTensor = _resolve("FakeTensor", "torch._subclasses.FakeTensor", _Never)
FunctionalTensor = _resolve(
    "FunctionalTensor", "torch._subclasses.functional_tensor.FunctionalTensor", _Never
)
# The public getter raises where old and new settings are mixed.
matmul_precision = _resolve(
    "matmul_precision",
    "torch._C._get_fp32_precision_getter",
    lambda backend, op: "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
)
# What an op's kernel for autograd passes a call on with; without it there is no such kernel.
after_autograd = _resolve("after_autograd", "torch._C._after_autograd_keyset", None)
# The older of the two vmaps, which autograd uses for a batch of gradients.
dispatch_keys = _resolve("dispatch_keys", "torch._C._dispatch_keys", None)
enter_vmap = _resolve("enter_vmap", "torch._C._vmapmode_increment_nesting", None)
leave_vmap = _resolve("leave_vmap", "torch._C._vmapmode_decrement_nesting", None)
remove_batch = _resolve("remove_batch", "torch._remove_batch_dim", None)
add_batch = _resolve("add_batch", "torch._add_batch_dim", None)
parse_key = _resolve("parse_key", "torch._C._dispatch_key_parse", None)
_BATCHED = [parse_key(name) for name in ("Batched", "FuncTorchBatched")] if parse_key else []


def is_batched(arg: Any) -> bool:
    """Whether one of PyTorch's vmaps has `arg` stand for a batch of tensors."""
    if not isinstance(arg, Tensor) or dispatch_keys is None:
        return False
    keys = dispatch_keys(arg)
    return any(map(keys.has, _BATCHED))


def is_traced() -> bool:
    """Whether torch.jit.trace is at work."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def forward_level() -> int:
    """The level of forward-mode differentiation, -1 outside of it."""
    return getattr(forward_ad, "_current_level", -1)


def cached_weights() -> dict[Any, Any] | None:
    """What `parametrize.cached()` keeps of parametrized weights, None outside of it."""
    return (
        getattr(parametrize, "_cache", None) if getattr(parametrize, "_cache_enabled", 0) else None
    )


def replicated(module: nn.Module) -> dict[str, Tensor]:
    """What a replica that nn.DataParallel made has instead of parameters: attributes."""
    return getattr(module, "_former_parameters", {})


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run where a module is called."""
    return any(getattr(module, name, ()) for name in _HOOKS)
