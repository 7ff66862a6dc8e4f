"""Triton's runtime: inert but for its exceptions."""

import inert

inert.make_inert(__name__)
