"""Can this machine, and can these ranks together, carry a run? Findings with their remedies."""

from rest_mega.diagnosis.findings import ERROR, OK, WARNING, Finding

__all__ = ["ERROR", "OK", "WARNING", "Finding"]
