"""Fusion heads as modules, and disentangled gradients for any other fusion module."""

from .decoupled import Cat, Decoupled
from .heads import MODULES, ConcatFusion, FiLMFusion, SumFusion

__all__ = ["MODULES", "Cat", "ConcatFusion", "Decoupled", "FiLMFusion", "SumFusion"]
