"""A report's data, and synthetic runs as large as a report must bear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rest_mega.dialects import Region

_WORDS = [
    "<tool_call>",
    '{"name": "',
    "add",
    '", "arguments"',
    ': {"a"',
    ": ",
    "17",
    "}}",
    "</tool_call>",
]
_REGIONS = [1, 6, 2, 6, 3, 5, 4, 5, 1]  # fmt: skip


def embedded(path: Path) -> str:
    """The packed data of a page."""
    text = path.read_text()
    mark = 'type="application/octet-stream;base64">'
    start = text.index(mark) + len(mark)
    return text[start : text.index("</script>", start)]


def synthetic_run(folder: Path, trajectories: int, tokens: int, **more: Any) -> Path:
    """The files of a run of two ranks with so many trajectories of about so many tokens, a third
    of them sampled; some are malformed, truncated, or have failed calls. `more` is laid over every
    first trajectory of a step."""
    rng, steps = np.random.default_rng(0), max(1, trajectories // 16)
    folder.mkdir(parents=True)
    names = [region.name for region in Region]
    (folder / "run.json").write_text(json.dumps({"regions": names, "config": {"run": {"seed": 0}}}))
    _lines(folder / "metrics.jsonl", [_metrics(step, names, rng) for step in range(1, steps + 1)])
    rows = [_trajectory(n, 1 + n // 16, tokens, rng) for n in range(trajectories)]
    for row in rows[::16]:
        row.update(more)
    _lines(folder / "trajectories.jsonl", rows)
    (folder / "phases").mkdir()
    for rank in range(2):
        who = {"step": 1, "rank": rank, "place": f"DP {rank}", "host": "a"}
        spans = [row for step in range(1, steps + 1) for row in _spans(step, rank)]
        _lines(folder / "phases" / f"rank_{rank}.jsonl", [who, *spans])
    return folder


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(step: int, names: list[str], rng: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "train/loss": float(rng.normal()),
        "reward/mean": step / 100,
        "tokens/s": 500.0,
    }
    for kind in ("entropy", "weight", "share", "gradient"):
        row |= {f"{kind}/{name}": float(rng.random()) for name in names}
    return row | {"time/rollout": 1.0, "policy/own_metric": 1.0 / step}


def _spans(step: int, rank: int) -> list[dict[str, Any]]:
    start = 1e9 + 4 * step
    waits = {"waits": [[0.5, 1.4]]} if rank else {}
    return [
        {"step": step, "phase": "rollout", "start": start, "seconds": 2.0, **waits},
        {"step": step, "phase": "train", "start": start + 2, "seconds": 1.5},
    ]


def _trajectory(n: int, step: int, tokens: int, rng: Any) -> dict[str, Any]:
    seen = int(tokens * 2 / 3)
    sampled = max(1, tokens - seen)
    text = [f" word{i % 997}" for i in range(seen)] + [_WORDS[i % 9] for i in range(sampled)]
    logprob = -rng.exponential(0.5, sampled)
    columns = {
        "logprob": logprob,
        "weight": rng.gamma(2.0, 0.5, sampled),
        "gap": rng.normal(0, 1e-3, sampled),
        "entropy": rng.exponential(0.4, sampled),
        "advantage": np.full(sampled, rng.normal()),
    }
    bad = n % 5 == 1
    outcome = {"status": "malformed" if bad else "ok", "content": "34", "seconds": 0.02}
    call = {"name": "add", "arguments": {"a": 17}}
    return {
        "step": step, "prompt": f"p{n // 8}", "kind": "sum", "sibling": n % 8,
        "reward": float(rng.random()), "parts": {"format": 1.0}, "advantage": 0.5,
        "success": bool(n % 2), "stop": "token_limit" if n % 7 == 0 else "answered", "text": text,
        "region": [9] * seen + [_REGIONS[i % 9] for i in range(sampled)],
        "turn": [-1] * seen + [0] * sampled,
        "sampled": {name: np.round(column, 4).tolist() for name, column in columns.items()},
        "turns": [{"start": seen, "well_formed": not bad, "ended": True,
                   "calls": [] if bad else [call], "outcomes": [outcome]}],
    }  # fmt: skip
