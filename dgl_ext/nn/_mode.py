"""A module's training mode by name, and the leaks that it sets."""

from __future__ import annotations

from torch import nn

from .._arguments.modes import check_leaks, get_mode


class HasMode(nn.Module):
    """Holds `mode`, `encoder_leak` and `head_leak`; assigning a mode sets both leaks."""

    def _set_mode(self, mode: str, encoder_leak: float | None, head_leak: float | None) -> None:
        self.encoder_leak, self.head_leak = check_leaks(mode, encoder_leak, head_leak)
        self._mode = mode

    @property
    def mode(self) -> str:
        """The mode's name; assigning one sets the leaks, and the default alpha of a head's loss."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self._set_mode(mode, None, None)

    def _mode_repr(self) -> list[str]:
        """The mode, and the leaks that are not as it sets them."""
        mode = get_mode(self.mode)
        usual = {"mode": "dgl", "encoder_leak": mode.encoder_leak, "head_leak": mode.head_leak}
        return [f"{n}={getattr(self, n)!r}" for n, v in usual.items() if getattr(self, n) != v]
