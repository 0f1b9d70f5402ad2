"""Passes of one module that all start from the same state, of which one alone leaves a trace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .. import _torch_private
from ..reference import _leak

_Pass = Callable[[tuple[Any, ...], dict[str, Any]], Any]

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()

# They write their running statistics in training mode only, by ops that do not count as writes.
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def exclusive(module: nn.Module) -> AbstractContextManager[Any]:
    """One call at a time: while a pass runs, the module holds other tensors than its own."""
    # Compiled code swaps nothing, and a lock cannot be traced. Kept beside the module, since a lock
    # can be neither copied nor pickled.
    if torch.compiler.is_compiling():
        return nullcontext()
    return _locks.setdefault(module, threading.RLock())


class Passes:
    """Runs a module from the state that it has now, however often, and leaves no trace in it.

    State is what its buffers hold and which attributes its parts have. Between here and `begin` the
    module may run by itself: that pass keeps what it writes.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Each part once, by one of its names: with ties resolved by functional_call a part that has
        # two would be swapped twice, and left with what it held the second time.
        self._parts = {f"{name}." if name else "": part for name, part in module.named_modules()}
        self._buffers: dict[str, Tensor] = {}
        # By buffer, so that tied buffers stay one: copies, and how often they were written to, None
        # where nothing counts. (Nothing counts writes through `.data`, either.)
        self._copies: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int | None] = {}
        for prefix, part in self._parts.items():
            for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
                self._buffers[prefix + name] = buffer
                self._versions[buffer] = None if _writes_uncounted(part) else _version(buffer)
                if buffer not in self._copies and _may_write(part):
                    self._copies[buffer] = _clone(buffer)
        self._before = self._attributes()

    @contextmanager
    def begin(self, share: float) -> Iterator[_Pass]:
        """Gives a function that runs a pass, with that share of gradient to the parameters."""
        copies, start = self._copies, {}
        for buffer, version in self._versions.items():
            if version is None or version != _version(buffer):
                # A norm's may have been written by another module: then from here on.
                start[buffer] = copies.pop(buffer) if buffer in copies else _clone(buffer)
            elif buffer in copies:
                start[buffer] = buffer  # it still holds what it held
        parameters: dict[str, Tensor] = {}
        leaked: dict[Tensor, Tensor] = {}
        for prefix, part in self._parts.items():
            for name, parameter in _parameters(part):
                if parameter not in leaked:
                    leaked[parameter] = _leak(parameter, share)
                parameters[prefix + name] = leaked[parameter]

        def run(inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            for buffer, value in start.items():
                fresh = self._versions[buffer] is not None and buffer in copies
                if not fresh or _version(copies[buffer]) != 0:
                    copies[buffer] = _clone(value)
            buffers = {name: copies[b] for name, b in self._buffers.items() if b in copies}
            _put_back(self._before)
            values = {**parameters, **buffers}
            return functional_call(self._module, values, inputs, keywords, tie_weights=False)

        after = self._attributes()
        with _uncached(self._module):
            try:
                yield run
            finally:
                _put_back(after)

    def _attributes(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Attributes and buffers of the parts: where they are held, and what is there now."""
        if torch.compiler.is_compiling():
            return []
        places = [place for p in self._parts.values() for place in (vars(p), p._buffers)]
        # Those of a scripted part are in C++.
        return [(place, dict(place)) for place in places if isinstance(place, dict)]


def _parameters(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(recurse=False, remove_duplicate=False)
    yield from _torch_private.replicated(part).items()


def _writes_uncounted(part: nn.Module) -> bool:
    return isinstance(part, _NORMS) and _may_write(part)


def _may_write(part: nn.Module) -> bool:
    """Whether a pass may write to the buffers of this part. Only of torch's norms it is known."""
    hooked = part._forward_pre_hooks or part._forward_hooks
    return bool(part.training or hooked or type(part) not in _NORMS)


def _clone(tensor: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # else nothing counts what is written to it
            return tensor.detach().clone()
    return tensor.detach().clone()


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None if nothing counts."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _put_back(held: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for place, values in held:
        if place.keys() != values.keys():
            for name in place.keys() - values.keys():
                del place[name]
        place.update(values)


@contextmanager
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
