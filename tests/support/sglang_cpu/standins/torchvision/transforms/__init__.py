"""InterpolationMode; everything else is inert."""

from __future__ import annotations

import enum

import inert


class InterpolationMode(enum.Enum):
    """The names that transformers maps to PIL's."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


inert.make_inert(__name__)
