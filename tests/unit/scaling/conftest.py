"""The scaling example's files and the benchmarks' are scripts that import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "examples" / "scaling"), str(ROOT / "benchmarks")]
