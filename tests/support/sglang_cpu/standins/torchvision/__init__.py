"""Torchvision, of which transformers wants the name of an interpolation and nothing else here."""

from __future__ import annotations

import inert

__version__ = "0.28.0"

inert.make_inert(__name__)
