"""The functional module's own name of the interpolation; everything else is inert."""

from __future__ import annotations

import inert

from torchvision.transforms import InterpolationMode

__all__ = ["InterpolationMode"]

inert.make_inert(__name__)
