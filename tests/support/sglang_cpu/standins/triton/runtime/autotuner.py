"""The exceptions that torch and SGLang name in `except` clauses."""

from __future__ import annotations

import inert


class OutOfResources(Exception):
    """A kernel that does not fit."""


class PTXASError(Exception):
    """A kernel that does not assemble."""


inert.make_inert(__name__)
