"""The functions: a plain call goes to the op, which checks it; all others are checked here."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from . import _torch_private, reference
from ._arguments.cross_entropy import CrossEntropy, LossNumbers, unpack_if_plain
from ._arguments.heads import HEADS, Biases, Features, Head, Weights, get_head
from ._arguments.modes import check_leaks, get_mode
from ._arguments.validate import check_choice, check_present, is_foreign, plain_tuple
from ._ops import extension, logits
from ._ops import step as step_op
from ._ops.library import Executor
from ._ops.step import StepOptions
from .types import DecoupledLogits, DecoupledLoss

BACKENDS = ("auto", "fused", "library", "reference")

# What each backend has the ops do; "reference" calls none.
_EXECUTORS = {"fused": Executor.FUSED, "library": Executor.LIBRARY}
_FORMER_NAMES = {"cpu": "fused", "cuda": "fused", "composed": "library"}
# Where the library executor is compiled.
LIBRARY_DEVICES = frozenset({"cuda"})
# The kernels use cp.async and mma.sync as of this compute capability.
_LEAST_CAPABILITY = (8, 0)


def fused_decouple(
    features: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    fusion: str = "concat",
    present: Sequence[Tensor | None] | None = None,
    mode: str = "dgl",
    encoder_leak: float | None = None,
    head_leak: float | None = None,
    backend: str = "auto",
) -> DecoupledLogits:
    r"""Fuses modalities with disentangled gradients: one forward, one ordinary backward.

    With features `h_i` of shape `(..., D_i)`, M of them, and C outputs:

    ======  ==============================================  =====================================
    fusion  fused `z`                                       unimodal `z_i` (the others absent)
    ======  ==============================================  =====================================
    concat  `sum_i h_i W_i^T + b`, `W = [W_1 | ... | W_M]`  `h_i W_i^T + b`
    sum     `sum_i (h_i W_i^T + b_i)`                       `h_i W_i^T + b_i`
    film    `(gamma * y + beta) W_o^T + b_o`,               x: `beta(x) W_o^T + b_o`,
            `[gamma | beta] = x W_f^T + b_f`                y: `(b_gamma * y + b_beta) W_o^T + b_o`
    ======  ==============================================  =====================================

    Which gradient reaches which input, for any loss on the outputs:

    - a feature `h_i` receives that of its own `z_i`, never that of `z`;
    - `weight` and `bias` receive that of `z`, never that of a `z_i`;
    - an input whose outputs no loss uses receives `None`, as if it were detached; zeros under
      `torch.compile`, which traces the backward pass with a gradient for every output.

    So `loss(z) + sum_i alpha_i * loss(z_i)` with one `backward()` trains the head by the multimodal
    loss and each encoder by its own unimodal loss.

    Args:
        features: M tensors `(..., D_i)` with equal leading dimensions, of one floating dtype
            (float64, float32, bfloat16, float16) and device. M is 1 to 8; film takes two, and the
            first, x, conditions the second, y.
        weight: concat: `(C, sum D_i)`. sum: M of `(C, D_i)`. film: `(2H, D_x)` and `(C, H)`, with
            `H = D_y`.
        bias: concat: `(C,)`. sum: M of `(C,)`. film: `(2H,)` and `(C,)`. Any of them may be None.
        fusion: "concat", "sum" or "film".
        present: per modality a bool tensor of the leading shape, or None for "everywhere". Where it
            is False the feature counts as zero, is not read, and gets a gradient of exactly zero.
        mode: "dgl", as said above; "joint": the gradient of `z` reaches the features, too, for
            joint training by the fused loss alone; "joint+unimodal": plain autograd of all outputs.
            It sets the leaks, 0 and 0, 1 and 0, 1 and 1, where they are None.
        encoder_leak: the share, 0 to 1, of the fused logits' gradient that the features receive on
            top of their own. None: as the mode sets it.
        head_leak: the share, 0 to 1, of the unimodal logits' gradients that the head receives on
            top of that of the fused ones. None: as the mode sets it.
        backend: "fused" is this project's kernels, on CUDA in one launch. "library" (CUDA only) is
            cuBLAS on views of the weight, with a few kernels between. "reference" is plain PyTorch.
            "auto" takes the kernels where they can run; on CUDA it takes "fused" for small heads
            and "library" for large ones, and on a GPU below compute capability 8.0 the reference.

    Returns:
        `DecoupledLogits(fused, unimodal)`: `(..., C)` and a tuple of M `(..., C)`, in the features'
        dtype. Under autocast all tensors are cast as for `nn.Linear`. The backends other than
        "reference" can be differentiated once.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices, counts or values do not fit, or an explicit `backend` cannot
            take these arguments.
        RuntimeError: `backend` names a part of the extension that did not load.

    Source: Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning",
    ICCV 2025, arXiv 2507.10213; the unimodal logits of film are our reading of its rule.

    Example:
        >>> audio, video = torch.randn(8, 32, requires_grad=True), torch.randn(8, 64)
        >>> weight, bias = torch.randn(5, 96, requires_grad=True), torch.zeros(5)
        >>> out = dgl_ext.fused_decouple((audio, video), weight, bias)
        >>> out.fused.shape, len(out.unimodal)
        (torch.Size([8, 5]), 2)
        >>> out.fused.square().mean().backward()
        >>> audio.grad is None, weight.grad is None
        (True, False)
    """
    head = get_head(fusion)
    leaks = check_leaks(mode, encoder_leak, head_leak)
    plain = _unpack_if_plain(backend, head, features, weight, bias, present)
    refusal = None
    if plain is not None:
        tensors, masks = plain
        try:
            outputs = logits.apply(fusion, *tensors, *leaks, masks)
            return DecoupledLogits(outputs[0], outputs[1:])
        except RuntimeError as error:
            refusal = _refusal(error)
    tensors = head.check(features, weight, bias)
    masks = check_present(present, tensors[0])
    if refusal:
        raise refusal
    executor = _choose_executor(backend, tensors)
    arguments = (fusion, *tensors, *leaks, masks)
    if executor is None:
        return reference.compute(*arguments)
    outputs = logits.apply(*arguments, executor)
    return DecoupledLogits(outputs[0], outputs[1:])


def fused_decouple_cross_entropy(
    features: Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    fusion: str = "concat",
    alpha: float | Sequence[float] | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    present: Sequence[Tensor | None] | None = None,
    mode: str = "dgl",
    encoder_leak: float | None = None,
    head_leak: float | None = None,
    backend: str = "auto",
) -> DecoupledLoss:
    r"""The training step of a head: logits, cross-entropy of every branch, and all gradients.

    With `z` and `z_i` as `fused_decouple` computes them, and `cross_entropy` exactly that of
    `torch.nn.functional`:

        total = cross_entropy(z, target) + sum_i alpha_i * cross_entropy(z_i, target)

    `total.backward()` gives what that composition gives: the fused loss trains `weight` and `bias`,
    and alpha_i times the loss of modality i reaches `features[i]`. The gradients are computed in
    the forward pass, so `backward` only scales them, and the logits are never kept: they and their
    gradients exist for as many rows at a time as `dgl_ext.set_workspace_limit` allows.

    Args:
        features: as in `fused_decouple`: M tensors `(..., D_i)`.
        weight: as in `fused_decouple`.
        target: class indices of the leading shape, of any integer dtype up to int64, each in
            `[0, C)` or `ignore_index`; or soft targets, floating `(..., C)`, the probabilities of
            the classes as mixup and distillation make them. Those are read once, in their own
            dtype; `ignore_index` does not apply to them.
        bias: as in `fused_decouple`.
        fusion: "concat", "sum" or "film".
        alpha: what the unimodal losses are multiplied by, one number or one per modality; 0 sends
            an encoder gradients of zero. None: as the mode sets it, 1, or 0 for "joint". It scales
            the encoders' gradients only, so that under SGD it is their learning rate's multiplier,
            and under Adam it does next to nothing.
        reduction: "mean" divides each loss by the number of rows that count, or by the sum of their
            weights, sample times target's class; soft targets have no one class, so that class
            weights are no part of that sum. "sum" divides by nothing.
        ignore_index: rows with this target do not count in any loss.
        label_smoothing: share of the target, 0 to 1, that is spread evenly over the C classes.
        class_weight: `(C,)`: each row's loss is multiplied by the weight of its class; with label
            smoothing and soft targets, the term of each class by its own. Weights, like soft
            targets, are constants: finite, 0 or more, of any real dtype, without gradient.
        sample_weight: of the leading shape: each row's loss is multiplied by its weight.
        present: as in `fused_decouple`. A row without a modality does not count in its unimodal
            loss; a modality of which no counted row has weight adds 0 to the total.
        mode: "dgl"; "joint": only the fused loss counts, and trains all; "joint+unimodal": all
            losses train all. Sets alpha and the leaks where they are None.
        encoder_leak: as in `fused_decouple`.
        head_leak: as in `fused_decouple`.
        backend: as in `fused_decouple`.

    Returns:
        `DecoupledLoss`: the differentiable `total`; its parts `fused` and `unimodal`, detached and
        without alpha, one scalar each; `correct` and `count`, `(M + 1,)` int64, the top-1 hits and
        the rows that count; `losses` and `predictions`, `(M + 1, ...)`, of every row and branch.
        Losses are float64 for float64 features and float32 for all others. If the rows that count
        have no weight, or there are none, a mean is NaN and all gradients are zero. The backends
        other than "reference" can be differentiated once.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices, counts or values do not fit, or an explicit `backend` cannot
            take these arguments.
        RuntimeError: a target is out of range (IndexError from the reference; on CUDA a
            device-side assertion, as in PyTorch), a weight is negative or NaN (seen on the CPU
            only), or `backend` names a part of the extension that
            did not load.

    Source: Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning",
    ICCV 2025, arXiv 2507.10213, whose training loop this is in one pass.

    Example:
        >>> audio, video = torch.randn(8, 32, requires_grad=True), torch.randn(8, 64)
        >>> weight, target = torch.randn(5, 96, requires_grad=True), torch.randint(5, (8,))
        >>> loss = dgl_ext.fused_decouple_cross_entropy((audio, video), weight, target, alpha=2.0)
        >>> loss.total.backward()
        >>> audio.grad.shape, weight.grad.shape, loss.correct.shape
        (torch.Size([8, 32]), torch.Size([5, 96]), torch.Size([3]))
    """
    head = get_head(fusion)
    plain = _unpack_if_plain(backend, head, features, weight, bias, present)
    constants = plain and unpack_if_plain(target, class_weight, sample_weight, plain[0][0][0])
    refusal = None
    if plain is not None and constants is not None:
        tensors, masks = plain
        # To the cache 1 and True in a sequence are the same, and so is a tensor that has changed.
        numbers = (alpha, ignore_index, label_smoothing, encoder_leak, head_leak)
        cached = all(number is None or isinstance(number, (int, float)) for number in numbers)
        cached = cached and isinstance(reduction, str) and isinstance(mode, str)
        check = _checked_options if cached else _checked_options.__wrapped__
        options = check(
            fusion,
            len(tensors[0]),
            len(masks),
            mode,
            alpha,
            reduction,
            ignore_index,
            label_smoothing,
            encoder_leak,
            head_leak,
        )
        try:
            return step_op.apply(options, *tensors, constants, masks)
        except RuntimeError as error:
            refusal = _refusal(error)
    tensors = head.check(features, weight, bias)
    loss = CrossEntropy.check(
        tensors[0],
        tensors[1][-1].shape[0],
        target,
        present,
        get_mode(mode).alpha if alpha is None else alpha,
        reduction,
        ignore_index,
        label_smoothing,
        class_weight,
        sample_weight,
    )
    leaks = check_leaks(mode, encoder_leak, head_leak)
    if refusal:  # of what only an op can see, such as a target's values
        raise refusal
    executor = _choose_executor(backend, tensors)
    if executor is None:
        return reference.compute_cross_entropy(fusion, *tensors, loss, *leaks)
    masks = loss.present
    options = StepOptions(head.op, executor, len(tensors[0]), len(masks), loss.numbers, leaks)
    constants = loss.target, loss.class_weight, loss.sample_weight
    return step_op.apply(options, *tensors, constants, masks)


@functools.lru_cache(typed=True)  # a loop asks for the same step again and again
def _checked_options(
    fusion: str,
    modalities: int,
    masks: int,
    mode: object,
    alpha: object,
    reduction: object,
    ignore_index: object,
    label_smoothing: object,
    encoder_leak: object,
    head_leak: object,
) -> StepOptions:
    """Checks a step's numbers."""
    alpha = get_mode(mode).alpha if alpha is None else alpha
    return StepOptions(
        HEADS[fusion].op,
        Executor.AUTO,
        modalities,
        masks,
        LossNumbers.check(modalities, alpha, reduction, ignore_index, label_smoothing),
        check_leaks(mode, encoder_leak, head_leak),
    )


def _refusal(error: RuntimeError) -> RuntimeError:
    """Returns an op's own error, which is said again in the user's terms; raises all others."""
    if "dgl_ext::" not in str(error):
        raise error
    return error


def check_backend(backend: str) -> str:
    """Returns `backend` if there is one of that name."""
    if isinstance(backend, str) and backend in _FORMER_NAMES:
        raise ValueError(f'backend: "{backend}" is now called "{_FORMER_NAMES[backend]}"')
    return check_choice("backend", backend, BACKENDS)


def _unpack_if_plain(
    backend: str, head: Head, features: object, weight: object, bias: object, present: object
) -> tuple[tuple[Features, Weights, Biases], tuple[Tensor | None, ...]] | None:
    """Returns what `head.check` and `check_present` do if this is a plain call that fits, or None.

    Nearly all calls are plain: tensors in lists or tuples, eager, no autocast, the best backend.
    Then the op alone checks shapes, dtypes and devices, as it does for everyone, in 8 us; a look
    at each tensor from Python takes ten times as long within a training step, where it is cold.
    """
    if backend != "auto" or torch.compiler.is_compiling():
        return None
    tensors = head.unpack_if_plain(features, weight, bias)
    masks = () if present is None else plain_tuple(present, or_none=True)
    if tensors is None or masks is None:
        return None
    if present is not None and len(masks) != len(tensors[0]):
        return None
    like = tensors[0][0]
    device = "cpu" if like.is_cpu else "cuda" if like.is_cuda else None
    if device is None or not extension.available(device):
        return None
    if device == "cuda" and not _has_kernels(like.get_device()):
        return None
    if torch.is_autocast_enabled(device) or _beyond_ops():
        return None
    return tensors, masks


def _beyond_ops() -> str | None:
    """Names what is under way that takes operations of PyTorch only, if anything is."""
    if _torch_private.under_transforms():
        return "torch.func"
    if torch.compiler.is_compiling():
        return None
    if _torch_private.is_traced():
        return "torch.jit.trace"
    return "forward-mode differentiation" if _torch_private.forward_level() >= 0 else None


@functools.cache
def _has_kernels(index: int) -> bool:
    """Whether the GPU of this index can run the kernels."""
    return torch.cuda.get_device_capability(index) >= _LEAST_CAPABILITY


def _choose_executor(backend: str, tensors: tuple[Features, Weights, Biases]) -> Executor | None:
    """Returns how the ops shall compute, None for the reference; raises if that cannot be had."""
    features = tensors[0]
    device = features[0].device.type
    beyond = _beyond_ops()
    for tensor in chain(*tensors):
        if is_foreign(tensor):
            beyond = f"what {type(tensor).__name__} does"
    if backend == "auto":
        # An exported program of plain PyTorch can be trained, and needs nothing of ours to run.
        if device not in ("cpu", "cuda") or beyond or torch.compiler.is_exporting():
            return None
        if extension.available(device):
            old = device == "cuda" and not _has_kernels(features[0].get_device())
            return None if old else Executor.AUTO
        warnings.warn(
            f"dgl_ext runs its slower reference: {extension.error(device)}; see python -m dgl_ext",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    if check_backend(backend) == "reference":
        return None
    if beyond:
        raise ValueError(
            f'backend: "{backend}" cannot be part of {beyond}: use backend="reference" or "auto"'
        )
    if device not in ("cpu", "cuda"):
        raise ValueError(f'backend: "{backend}" needs features on a CPU or CUDA, got {device}')
    if backend == "library" and device not in LIBRARY_DEVICES:
        raise ValueError(f'backend: "library" needs features on a CUDA device, got {device}')
    extension.require(device)
    return _EXECUTORS[backend]
