"""Calls of a module by which only a share of the gradient gets to its parameters.

The module itself is called, hooks included, with other tensors in the places of its parameters.
Seen from other threads it would be another module for that time, hence `exclusive`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import _torch_private
from .reference import _leak

_lock = threading.RLock()


def exclusive() -> contextlib.AbstractContextManager[Any]:
    """Keeps other threads from calls of modules whose parameters are replaced for a time."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _lock


def call(
    module: nn.Module,
    share: float,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> Any:
    """Calls `module` on `buffers`, if any, and parameters that get `share` of the gradient."""
    leaked: dict[int, Tensor] = {}  # a tensor in several places stays one tensor
    replaced: dict[str, Tensor] = {}
    # One entry for each place, though a module may have several names: replaced under two of them,
    # a parameter would not come back.
    for prefix, owner in module.named_modules():
        places = owner.named_parameters(prefix, recurse=False, remove_duplicate=False)
        for name, parameter in places:
            if id(parameter) not in leaked:
                leaked[id(parameter)] = _leak(parameter, share)
            replaced[name] = leaked[id(parameter)]
    with _uncached(module):
        return functional_call(
            module, {**replaced, **(buffers or {})}, args, dict(kwargs or {}), tie_weights=False
        )


@contextlib.contextmanager
def _uncached(module: nn.Module) -> Iterator[None]:
    """Has parametrizations compute anew what `parametrize.cached()` keeps of other calls."""
    cache = None if torch.compiler.is_compiling() else _torch_private.cached_weights()
    if cache is None:
        yield
        return
    modules = {id(owner) for owner in module.modules()}

    def take() -> dict[Any, Any]:
        return {key: cache.pop(key) for key in list(cache) if key[0] in modules}

    before = take()
    try:
        yield
    finally:
        take()
        cache.update(before)


def check_not_sharded(argument: str, module: nn.Module, instead: str) -> None:
    """Raises if FSDP gathers parameters inside `module`: it would bring back the true ones."""
    # Seen from here they are shards then, and else whole. Tensor parallel parameters are shards,
    # too, and fine. Importing FSDP takes seconds, so only where somebody uses it.
    if any(hasattr(value, "full_tensor") for value in module.parameters()):
        from torch.distributed.fsdp import FSDPModule

        for name, part in module.named_modules():
            if isinstance(part, FSDPModule):
                where = f'"{name}", a part of it' if name else "it"
                raise ValueError(
                    f"{argument}: expected no sharding within, but fully_shard was called on "
                    f"{where}; call it on {instead}"
                )
