"""What the functions return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _torch_private
from ._arguments.validate import check_alpha, check_loss, check_names, check_per_output

# Gradients of one that `DecoupledLoss.backward` hands to autograd, by device and dtype. One that is
# in use is not in here: a hook that writes to it must not be felt by another thread's backward.
_idle: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _take_one(total: Tensor) -> tuple[Tensor, bool]:
    """Returns a one that nobody else uses, and whether it may be kept for the next backward."""
    plain = type(total) is Tensor  # fake tensors and other subclasses need one of their own
    one = _idle.pop((total.device, total.dtype), None) if plain else None
    if one is not None and one._version == 0:  # a hook that kept it may have written to it since
        return one, True
    with torch.inference_mode(False):
        one = torch.ones_like(total)
    one._dgl_ext_one = True  # type: ignore[attr-defined]
    # While a CUDA graph is captured the fill is only recorded: nothing else may read what it fills.
    return one, plain and not (total.is_cuda and torch.cuda.is_current_stream_capturing())


def is_unit_gradient(gradient: Tensor) -> bool:
    """Whether `gradient` is known to be one, without a look at what it holds."""
    return getattr(gradient, "_dgl_ext_one", False) and gradient._version == 0


class DecoupledLogits(NamedTuple):
    """Logits of a fusion head with disentangled gradients.

    Attributes:
        fused: `(..., C)`, from all modalities. Its gradient trains the head.
        unimodal: one `(..., C)` per modality, from that modality alone. Its gradient trains that
            modality's encoder.
    """

    fused: Tensor
    unimodal: tuple[Tensor, ...]

    def loss(
        self,
        criterion: Callable[..., Tensor] | Sequence[Callable[..., Tensor]],
        *targets: Any,
        alpha: float | Tensor | Sequence[float] = 1.0,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Puts a loss on every output: `total = l(fused) + sum_i alpha_i * l(unimodal_i)`.

        For any criterion and any outputs, those of `dgl_ext.nn.Decoupled` too. The cross-entropy of
        a fusion head is faster as that head's `cross_entropy`.

        Args:
            criterion: called as `criterion(output, *targets)`, returns a scalar; or M + 1 such
                functions, for the fused output and for each modality's.
            *targets: what the criterion takes besides, the same for every output.
            alpha: the factor of the unimodal losses, or one per modality. A scalar tensor is not
                read: under `torch.compile` it may change from call to call.

        Returns:
            `(total, parts)`: the scalar to call `backward()` on, and the M + 1 losses, the fused
            one first, detached, alpha not applied.

        Raises:
            TypeError: a criterion is not callable or returns no tensor, or alpha is no number.
            ValueError: a count does not fit the outputs, or a loss is not a scalar.

        Example:
            >>> head = dgl_ext.nn.Decoupled(torch.nn.Bilinear(6, 4, 3))
            >>> out = head(torch.randn(8, 6), torch.randn(8, 4))
            >>> total, parts = out.loss(torch.nn.MSELoss(), torch.randn(8, 3), alpha=2.0)
            >>> total.backward()
            >>> len(parts)
            3
        """
        count = len(self.unimodal)
        criteria = check_per_output("criterion", criterion, count)
        is_scalar = isinstance(alpha, Tensor) and alpha.dim() == 0
        alphas: Sequence[Any] = (alpha,) * count if is_scalar else check_alpha(alpha, count)
        losses = [
            check_loss(f"criterion[{k}]", function(output, *targets))
            for k, (function, output) in enumerate(
                zip(criteria, (self.fused, *self.unimodal), strict=True)
            )
        ]
        total = losses[0]
        for factor, value in zip(alphas, losses[1:], strict=True):
            total = total + factor * value
        return total, tuple(value.detach() for value in losses)


class DecoupledLoss(NamedTuple):
    """Cross-entropy of a fusion head with disentangled gradients.

    Attributes:
        total: `fused + sum_i alpha_i * unimodal_i`, a scalar: call `backward()` on it, or on the
            whole, which saves two small kernels on CUDA.
        fused: the fused logits' loss, detached.
        unimodal: one loss per modality, detached, alpha not applied.
        correct: `(M + 1,)` int64, how many of the rows that count are top-1 hits, fused first;
            with soft targets, of their likeliest class.
        count: `(M + 1,)` int64, the rows that count: they have a target, and the modality.
        losses: `(M + 1, ...)`, of every row, as `reduction="none"` gives them: class weights and
            smoothing applied, sample weights not; 0 where a row does not count. With class indices
            alone `exp(-losses)` is the probability that each branch gives the right class.
        predictions: `(M + 1, ...)` int64, of every row, whether it counts or not: the class of the
            largest logit that `dgl_ext.fused_decouple` would return; of several that only rounding
            to 16 bits makes equal, any one.
    """

    total: Tensor
    fused: Tensor
    unimodal: tuple[Tensor, ...]
    correct: Tensor
    count: Tensor  # type: ignore[assignment]  # nobody counts a tuple's entries here
    losses: Tensor
    predictions: Tensor

    def backward(
        self,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        """Computes gradients as `total.backward()` does, and on CUDA with nothing but the step.

        The training step has made all gradients already. `total.backward()` has autograd fill a
        tensor with one and the step multiply by it; here the step knows that it is one. With
        float16 features the gradients are still rounded to float16.

        Args:
            retain_graph: as in `torch.Tensor.backward`.
            create_graph: as in `torch.Tensor.backward`.
            inputs: as in `torch.Tensor.backward`.

        Example:
            >>> h, weight = torch.randn(8, 32, requires_grad=True), torch.randn(5, 32)
            >>> target = torch.randint(5, (8,))
            >>> dgl_ext.fused_decouple_cross_entropy((h,), weight, target).backward()
            >>> h.grad.shape
            torch.Size([8, 32])
        """
        one, keep = _take_one(self.total)
        self.total.backward(one, retain_graph, create_graph, inputs)
        if keep and one._version == 0:  # no hook wrote to it
            _idle[one.device, one.dtype] = one

    def log(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns the losses and accuracies as a flat dict of detached scalars, for any logger.

        Args:
            names: of the modalities; by default `modality_0` and so on.

        Returns:
            `loss/total`, `loss/fused`, `loss/NAME` of each modality, `accuracy/fused` and
            `accuracy/NAME`: tensors on their device, so that nothing waits for it. An accuracy is
            `correct / count`, NaN where no row counts.

        Raises:
            TypeError: `names` is no sequence of strings.
            ValueError: there is not one name per modality, or one comes twice or is "fused" or
                "total".

        Example:
            >>> h, weight = torch.randn(8, 32), torch.randn(5, 32)
            >>> loss = dgl_ext.fused_decouple_cross_entropy((h,), weight, torch.randint(5, (8,)))
            >>> sorted(loss.log(["audio"]))
            ['accuracy/audio', 'accuracy/fused', 'loss/audio', 'loss/fused', 'loss/total']
        """
        branches = ("fused", *check_names(names, len(self.unimodal)))
        log = {"loss/total": self.total.detach()}
        for name, value in zip(branches, (self.fused, *self.unimodal), strict=True):
            log[f"loss/{name}"] = value
        accuracies = (self.correct / self.count).unbind()
        log |= {f"accuracy/{name}": a for name, a in zip(branches, accuracies, strict=True)}
        return log


_NOT_A_SCALAR = "DecoupledLoss: expected one scalar tensor, got the whole result: use its `.total`"


def _refuse(self: DecoupledLoss, *_: object) -> Any:
    raise TypeError(_NOT_A_SCALAR)


def _refuse_format(self: DecoupledLoss, specification: str) -> str:
    return _refuse(self) if specification else str(self)


def _refuse_attribute(self: DecoupledLoss, name: str) -> Any:
    hint = f". {_NOT_A_SCALAR}" if hasattr(Tensor, name) else ""
    raise AttributeError(f"'DecoupledLoss' object has no attribute '{name}'{hint}")


def _refuse_function(cls: type, function: Any, *_: object, **__: object) -> Any:
    raise TypeError(f"{getattr(function, '__name__', function)}: {_NOT_A_SCALAR}")


# A loop may take the whole for its total. Arithmetic would join or repeat the tuple in silence, and
# a function of PyTorch would say nothing of the total.
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow")
_OTHER = ("lt", "le", "gt", "ge", "neg", "pos", "abs", "float", "int", "round")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(DecoupledLoss, f"__{_name}__", _refuse)
DecoupledLoss.__format__ = _refuse_format  # type: ignore[assignment]
DecoupledLoss.__getattr__ = _refuse_attribute  # type: ignore[attr-defined]
DecoupledLoss.__torch_function__ = classmethod(_refuse_function)  # type: ignore[arg-type, attr-defined]


def _register(result: type[tuple[Any, ...]]) -> None:
    """Lets exported programs be saved that return it, and checkpoints be loaded that hold it."""
    name = f"dgl_ext.{result.__name__}"
    _torch_private.register_namedtuple(result, serialized_type_name=name)
    torch.serialization.add_safe_globals([result])


_register(DecoupledLogits)
_register(DecoupledLoss)
