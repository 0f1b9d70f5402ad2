"""Disentangled Gradient Learning for multimodal networks, as one op and one backward pass.

Wei et al., "Boosting Multimodal Learning via Disentangled Gradient Learning", ICCV 2025,
arXiv 2507.10213.
"""

import torch

from . import diagnostics, nn, reference
from ._ops import extension as _extension
from .functional import fused_decouple, fused_decouple_cross_entropy
from .settings import set_workspace_limit, workspace_limit
from .types import DecoupledLogits, DecoupledLoss

__version__ = "0.1.0"

if _extension.available():
    from ._ops import flops as _flops
    from ._ops import library as _ops_library

    _library = _ops_library.register()
    _flops.register()

# To torch.fx a call is one node: what it does depends on what it gets.
torch.fx.wrap("fused_decouple")
torch.fx.wrap("fused_decouple_cross_entropy")

__all__ = [
    "DecoupledLogits",
    "DecoupledLoss",
    "__version__",
    "diagnostics",
    "fused_decouple",
    "fused_decouple_cross_entropy",
    "nn",
    "reference",
    "set_workspace_limit",
    "workspace_limit",
]
