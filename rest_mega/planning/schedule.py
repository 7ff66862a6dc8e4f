"""The pipeline's timeline: Megatron's 1F1B and interleaved schedules, pass by pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def order(stage: int, stages: int, chunks: int, microbatches: int) -> list[tuple[bool, int, int]]:
    """(is forward, chunk, micro-batch) of one pipeline rank, in Megatron's order: warm-up forwards,
    then one forward and one backward in turn, then the rest of the backwards."""
    total = microbatches * chunks
    group = stages * chunks
    if chunks == 1:
        warm = min(stages - stage - 1, total)
    else:
        warm = min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)

    def place(k: int, forward: bool) -> tuple[bool, int, int]:
        if chunks == 1:
            return forward, 0, k
        size = min(stages, microbatches - k // group * stages)
        inside = k % group
        chunk = inside // size
        return (
            forward,
            chunk if forward else chunks - 1 - chunk,
            k // group * stages + inside % size,
        )

    passes = [place(k, True) for k in range(warm)]
    for k in range(total - warm):
        passes += [place(warm + k, True), place(k, False)]
    return passes + [place(k, False) for k in range(total - warm, total)]


def in_flight(stage: int, stages: int, chunks: int, microbatches: int) -> int:
    """Most chunk passes whose activations a rank holds at once."""
    total = microbatches * chunks
    if chunks == 1:
        return min(stages - stage, total)
    return min((stages - stage - 1) * 2 + (chunks - 1) * stages + 1, total)


def makespan(
    forward: Sequence[float],
    backward: Sequence[float],
    microbatches: int,
    chunks: int = 1,
    send: float = 0.0,
) -> float:
    """Seconds of one optimizer step's pipeline. `forward[b]`, `backward[b]`: of one micro-batch in
    block b of the layers, chunk * PP + p on rank p; `send`: between neighbours, not overlapped."""

    def took(is_forward: bool, block: int, microbatch: int) -> float:
        return forward[block] if is_forward else backward[block]

    return makespan_of(took, len(forward) // chunks, microbatches, chunks, send)


def makespan_of(
    took: Callable[[bool, int, int], float],
    stages: int,
    microbatches: int,
    chunks: int = 1,
    send: float = 0.0,
) -> float:
    """The same where every pass has its own seconds: `took(is forward, block, micro-batch)`."""
    queues = [order(p, stages, chunks, microbatches) for p in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    clock, next_pass, left = [0.0] * stages, [0] * stages, sum(map(len, queues))
    while left:
        before = left
        for p in range(stages):
            while next_pass[p] < len(queues[p]):
                is_forward, chunk, m = queues[p][next_pass[p]]
                block = chunk * stages + p
                needs = _needs(is_forward, block, m, stages * chunks)
                if needs is not None and needs not in done:
                    break
                local = needs is not None and (stages == 1 or needs[0] != is_forward)
                ready = 0.0 if needs is None else done[needs] + (0.0 if local else send)
                clock[p] = max(clock[p], ready) + took(is_forward, block, m)
                done[is_forward, block, m] = clock[p]
                next_pass[p], left = next_pass[p] + 1, left - 1
        assert left < before, "the schedule waits for itself"
    return max(clock)


def _needs(is_forward: bool, block: int, m: int, blocks: int) -> tuple[bool, int, int] | None:
    """The pass whose result a pass waits for."""
    if is_forward:
        return (True, block - 1, m) if block else None
    return (False, block + 1, m) if block < blocks - 1 else (True, block, m)
