"""Settings of the package: how much memory a training step may take for its intermediates."""

from __future__ import annotations

from ._arguments.validate import shown

_workspace_limit: int | None = None


def workspace_limit() -> int | None:
    """Returns the bound that `set_workspace_limit` has set, in bytes; None for the default."""
    return _workspace_limit


def set_workspace_limit(limit: int | None) -> int | None:
    """Bounds what a training step keeps of logits and their gradients at a time.

    `dgl_ext.fused_decouple_cross_entropy` needs M + 1 planes of (rows, C). Where those would take
    more than the limit, it works on as many rows at a time as fit (at least one tile of a kernel),
    and no other memory grows with rows times C. A larger limit means fewer and larger products.

    Args:
        limit: in bytes, at least 1. None puts the defaults back: 64 MiB on the CPU; 512 MiB on
            CUDA, where the library's products are given 1,024 rows at a time at least.

    Returns:
        The limit until now, so that a caller can put it back.

    Raises:
        TypeError: `limit` is not an int.
        ValueError: `limit` is not positive, or does not fit an int of 64 bits.

    Example:
        >>> before = dgl_ext.set_workspace_limit(256 * 2**20)
    """
    global _workspace_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"limit: expected an int or None, got {type(limit).__name__}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected a positive number of bytes, got {shown(limit)}")
    if limit is not None and limit >= 2**63:
        raise ValueError(f"limit: expected at most 2**63 - 1 bytes, got {shown(limit)}")
    before, _workspace_limit = _workspace_limit, limit
    return before
