"""What a training run does: how much the fusion attenuates, and which loss trains which parameter.

Nothing here changes a run: no `.grad`, no running statistics and no random state is different
afterwards.
"""

from ._attenuation import Attenuation, AttenuationMonitor, attenuation, plot_attenuation
from ._routing import Route, Routing, routing

__all__ = [
    "Attenuation",
    "AttenuationMonitor",
    "Route",
    "Routing",
    "attenuation",
    "plot_attenuation",
    "routing",
]
