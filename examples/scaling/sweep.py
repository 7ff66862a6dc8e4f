"""The scaling experiment: run a file's points, plan them, plot what was measured and planned.

    python examples/scaling/sweep.py run examples/scaling/cpu.yaml runs/scaling [--repeats 3]
    python examples/scaling/sweep.py plot runs/scaling
    python examples/scaling/sweep.py plan examples/scaling/gpus.yaml runs/planned

`run` starts `benchmarks/train_step.py` for one point after another, each in processes of its own,
and keeps every result in OUT/results.jsonl as soon as it is there: begun anew it goes on with what
is missing. With `--repeats N` every point is measured N times, in rounds, and medians are shown. A
point that fails is kept with its last errors, its output in OUT/logs; the others go on, and the
next `run` tries it again. Exit code 0: every point is there; 1: some are not; 2: bad input.
docs/scaling.md tells what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import plots
import psutil
from points import MEASURED, Point, Sweep, read_sweep
from prediction import device, predict
from results import RESULTS, keep, rows_of, seen, shared

from rest_mega.config import ConfigError, require
from rest_mega.launch import free_port
from rest_mega.planning import GPUS
from rest_mega.telemetry.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
ERROR = re.compile(r"(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)(?:: .*|$)")
KEPT_ERRORS = 5
GRACE_S = 10.0
"""How long a launcher has to end its ranks."""


def run(sweep: Sweep, out: Path, repeats: int, quiet: float) -> int:
    """Measure every point until it has `repeats` results, round by round. Exit code."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    failed: set[Point] = set()
    for number in range(1, repeats + 1):
        for point in sweep.points:
            if point in failed or len(rows_of(out, point)) >= number:
                continue
            if (twin := shared(out, point, number)) is not None:
                keep(out, twin)
                continue
            print(f"{point.name}, {number} of {repeats}", flush=True)
            row = measure(sweep, point, out, quiet)
            keep(out, row)
            if not row["ok"]:
                failed.add(point)
                print("  failed: " + "\n  ".join(row["errors"]), flush=True)
            else:
                got, said = row["measured"], row["predicted"]
                print(
                    f"  {got['tokens_per_second']:,.0f} tokens/s, {said['tokens_per_second']:,.0f} "
                    f"predicted; bubble {got['bubble']:.1%}, {said['bubble']:.1%} predicted; "
                    f"others took {got['others']:.0%} of the host",
                    flush=True,
                )
    there = sum(len(rows_of(out, point)) >= repeats for point in sweep.points)
    print(f"{there} of {len(sweep.points)} points are in {out / RESULTS}")
    return 0 if there == len(sweep.points) else 1


def measure(sweep: Sweep, point: Point, out: Path, quiet: float) -> dict[str, Any]:
    """The row of one point, run now."""
    row: dict[str, Any] = {
        "point": dataclasses.asdict(point),
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
    }
    log = out / "logs" / (re.sub(r"[^\w.-]+", "_", point.name) + ".log")
    with tempfile.TemporaryDirectory(dir=out) as folder:
        file = Path(folder).resolve() / "result.json"
        command = launch(sweep, point) + options(sweep, point, file, quiet)
        code = start(command, log, 60 * sweep.minutes)
        if code != 0 or not file.is_file():
            return row | {"ok": False, "code": code, "errors": last_errors(log)}
        result = json.loads(file.read_text("utf-8"))
    gpu = device(sweep, result)
    return row | {
        "ok": True,
        "gpu": dataclasses.asdict(gpu),
        "measured": {
            **result,
            "train": result["seconds"]["train"],
            "memory": max(result["memory"]),
            "rank_memory": result["memory"],
            "mfu": result["tflops_per_rank"] * 1e12 / gpu.flops,
        },
        "predicted": predict(point, gpu, result["run"]["dtype"]),
    }


def launch(sweep: Sweep, point: Point) -> list[str]:
    """The words that start the point's ranks, up to what each rank runs."""
    per_node = min(point.ranks, sweep.ranks_per_node)
    words: dict[str, Any] = {
        "python": sys.executable, "ranks": point.ranks, "nodes": point.ranks // per_node,
        "per_node": per_node, "host": socket.gethostname(), "port": free_port(),
    }  # fmt: skip
    return [word.format(**words) for word in sweep.launch]


def options(sweep: Sweep, point: Point, file: Path, quiet: float) -> list[str]:
    """What each rank runs."""
    replicas = point.parallel.data_parallel(point.ranks)
    names = ("model", "length", "tokens", "steps", "layers", "recompute",
             "tensor", "pipeline", "virtual_pipeline", "context", "expert")  # fmt: skip
    given = [f"--{name.replace('_', '-')}={getattr(point, name)}" for name in names]
    given += [f"--samples={point.trajectories // replicas}", "--spread=0", "--trained=1"]
    given += [f"--quiet={quiet}", f"--patience={50 * sweep.minutes}"]
    given += ["--sequence"] * point.sequence + ["--speed"] * (sweep.gpu == MEASURED)
    return [str(ROOT / "benchmarks" / "train_step.py"), *given, "--distributed", f"--json={file}"]


def start(command: list[str], log: Path, seconds: float) -> int:
    """Exit code of a command whose output goes to `log`; it and all it started are ended after
    `seconds`, or with us."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
        )
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            file.write(f"TimeoutError: ended after {seconds / 60:g} minutes (key minutes)\n")
            return 124
        finally:
            if child.poll() is None:
                end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which torchrun puts into sessions of their own."""
    ranks = psutil.Process(child.pid).children(recursive=True)
    child.terminate()  # torchrun and srun then end theirs
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=GRACE_S)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.kill()
    child.wait()


def last_errors(log: Path) -> list[str]:
    """The last errors that a log tells, torchrun's own left out; where it tells none, its last
    lines."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    found = [match[0] for line in lines if (match := ERROR.search(line))]
    told = [line for line in dict.fromkeys(found) if "ChildFailedError" not in line]
    return (told or [line for line in lines if line.strip()])[-KEPT_ERRORS:]


def plan(sweep: Sweep, out: Path) -> int:
    """Plan every point, without running any; write the plots. Exit code: 1 where one does not
    fit."""
    require(
        sweep.gpu != MEASURED,
        f"gpu={MEASURED} is known only once a point was run: name one of {', '.join(GPUS)} in the "
        "file, or use the verb run",
    )
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "point": dataclasses.asdict(point),
            "ok": True,
            "predicted": predict(point, GPUS[sweep.gpu], "bf16"),
        }
        for point in sweep.points
    ]
    show(rows, out)
    tight = [p.name for p, r in zip(sweep.points, rows, strict=True) if not r["predicted"]["fits"]]  # type: ignore[index]
    for name in tight:
        print(f"does not fit on {sweep.gpu}: {name}")
    return 1 if tight else 0


def show(rows: list[dict[str, Any]], out: Path) -> None:
    """The table, and the plots' paths."""
    points = seen(rows)
    print(plots.table(points))
    for path in plots.draw_all(points, out):
        print(path)
    good = {json.dumps(row["point"]) for row in rows if row["ok"]}
    for key in {json.dumps(row["point"]): row for row in rows if not row["ok"]}:
        if key not in good:
            print(f"failed: {Point(**json.loads(key)).name}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("run", "plan", "plot"))
    parser.add_argument("paths", nargs="+", type=Path, help="SWEEP.yaml OUT, or OUT for plot")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each point")
    parser.add_argument(
        "--quiet",
        type=float,
        default=1.0,
        help="time steps only while others take at most this share of the host's cores",
    )
    parser.add_argument("--gpu", help="instead of the file's")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a point's ranks end with us
    try:
        require(
            len(given.paths) == (1 if given.verb == "plot" else 2),
            f"{given.verb} takes {'OUT' if given.verb == 'plot' else 'SWEEP.yaml and OUT'}, "
            f"not {len(given.paths)} paths",
        )
        require(given.repeats >= 1, f"--repeats {given.repeats} must be at least 1")
        require(0 < given.quiet <= 1, f"--quiet {given.quiet} is a share: above 0, at most 1")
        if given.verb == "plot":
            path = given.paths[0] / RESULTS
            require(path.is_file(), f"{path} is not there: the verb run writes it")
            show(read_rows(path), given.paths[0])
            return 0
        sweep = read_sweep(given.paths[0], given.gpu)
        if given.verb == "plan":
            return plan(sweep, given.paths[1])
        return run(sweep, given.paths[1], given.repeats, given.quiet)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
