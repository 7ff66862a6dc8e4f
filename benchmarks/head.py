"""Time, memory and accuracy of the vocabulary-parallel head, beside two forms that keep the logits.

    python benchmarks/head.py [--repeats 5] [--hidden 512 1024] [--vocab 32768 151936] [--rows 1024]
    python benchmarks/head.py --device cuda         (hidden 2048 4096, vocabulary 151936, rows 8192)

On a CPU: fp32, one thread, forward and backward with a gradient on log-prob and entropy (the form
that takes the gradient in its forward pass: on log-prob alone). Time: CPU time of this process over
that of the form's matmuls alone into warm buffers (the lower of whole and tiled), all interleaved,
median of the repeats. Memory: most bytes of tensors alive at once above the inputs and the two
gradients.
Errors against fp64: log-prob and entropy absolute, gradients relative to their largest entry.
Targets: general form <= 1.30 x its four matmuls at hidden 512 and <= 1.20 x at 1024, extra memory
<= 32 MiB whatever the vocabulary and the rows; gradient in forward <= 1.35 x its three matmuls.

On CUDA: bf16, times between CUDA events, peak of the allocator, general form by kernels and in
torch's operations. Targets: kernels <= 1.39 x their four matmuls at hidden 2048, 1.28 x at 4096.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rest_mega.losses.chunked import TILES
from rest_mega.losses.head import linear_logprob_entropy, linear_row_loss

Case = dict[str, torch.Tensor]
Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""logprob_R, entropy_R, d_hidden_RD, d_weight_VD"""


def make_case(rows: int, dim: int, vocab: int, device: str) -> Case:
    """Logits of standard deviation 3, the same ones every time on one kind of device."""
    make = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=make, device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return {
        "hidden": draw(rows, dim).to(dtype),
        "weight": (draw(vocab, dim) * 3 / dim**0.5).to(dtype),
        "targets": torch.randint(0, vocab, (rows,), generator=make, device=device),
        "d_logprob": draw(rows),
        "d_entropy": draw(rows),
    }


def backward(case: Case, logprob: torch.Tensor, entropy: torch.Tensor) -> None:
    """The gradient of the case's weighting of the two outputs."""
    torch.autograd.backward((logprob, entropy), (case["d_logprob"], case["d_entropy"]))


def leaves(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weights that gather their own gradient."""
    return case["hidden"].detach().requires_grad_(), case["weight"].detach().requires_grad_()


def answer(
    hidden: torch.Tensor, weight: torch.Tensor, logprob: torch.Tensor, entropy: torch.Tensor
) -> Answer:
    """What a way hands back to be judged."""
    assert hidden.grad is not None
    assert weight.grad is not None
    return logprob.detach(), entropy.detach(), hidden.grad, weight.grad


def general(case: Case, form: str) -> Answer:
    """`linear_logprob_entropy`: no logits kept, four matmuls."""
    hidden, weight = leaves(case)
    logprob, entropy = linear_logprob_entropy(hidden, weight, case["targets"], form=form)
    backward(case, logprob, entropy)
    return answer(hidden, weight, logprob, entropy)


def in_forward(case: Case) -> Answer:
    """`linear_row_loss`: a chunk of rows of logits kept, three matmuls, no gradient of entropy."""

    def weighted(logprob: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return logprob * case["d_logprob"][rows], case["d_logprob"][rows]

    hidden, weight = leaves(case)
    loss, logprob, entropy = linear_row_loss(hidden, weight, case["targets"], weighted)
    loss.backward()
    return answer(hidden, weight, logprob, entropy)


class Kept(torch.autograd.Function):
    """Logits -> log-prob and entropy; one buffer of logits becomes the saved softmax."""

    @staticmethod
    def forward(ctx: Any, logits_RV: torch.Tensor, targets_R: torch.Tensor) -> Any:
        target_R = logits_RV.gather(1, targets_R[:, None])[:, 0]
        m_R = logits_RV.amax(dim=1)
        p_RV = torch.exp(logits_RV - m_R[:, None])
        s_R = p_RV.sum(dim=1)
        p_RV.div_(s_R[:, None])
        log_s_R = m_R + s_R.log()
        mean_R = torch.linalg.vecdot(p_RV, logits_RV)
        ctx.save_for_backward(logits_RV, p_RV, targets_R, mean_R)
        return target_R - log_s_R, log_s_R - mean_R

    @staticmethod
    def backward(ctx: Any, d_logprob_R: torch.Tensor, d_entropy_R: torch.Tensor) -> Any:
        logits_RV, p_RV, targets_R, mean_R = ctx.saved_tensors
        g_RV = (logits_RV - mean_R[:, None]).mul_(d_entropy_R[:, None]).add_(d_logprob_R[:, None])
        g_RV.mul_(p_RV).neg_()
        g_RV.scatter_add_(1, targets_R[:, None], d_logprob_R[:, None])
        return g_RV, None


def unfused(case: Case) -> Answer:
    """The usual vocabulary-parallel loss: logits and softmax kept, one softmax pass."""
    hidden, weight = leaves(case)
    logprob, entropy = Kept.apply((hidden @ weight.T).float(), case["targets"])
    backward(case, logprob, entropy)
    return answer(hidden, weight, logprob, entropy)


def naive(case: Case) -> Answer:
    """Full logits, log_softmax, autograd."""
    hidden, weight = leaves(case)
    logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    logprob = logprobs.gather(1, case["targets"][:, None])[:, 0]
    backward(case, logprob, entropy)
    return answer(hidden, weight, logprob, entropy)


def ways(device: str) -> dict[str, tuple[Callable[[Case], Answer], int]]:
    """Name -> the way and how many of the large matmuls it needs."""
    kernels: dict[str, tuple[Callable[[Case], Answer], int]] = {}
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        kernels = {"general, kernels": (functools.partial(general, form="triton"), 4)}
    return kernels | {
        "general": (functools.partial(general, form="chunked"), 4),
        "gradient in forward": (in_forward, 3),
        "unfused, logits kept": (unfused, 3),
        "naive autograd": (naive, 3),
    }


def clock(run: Callable[[], object], device: str) -> float:
    """Seconds of `run`: CPU time of this process, or between two events of the GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def matmuls(
    case: Case, row_tile: int, vocab_tile: int
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(the logits' matmul, all three), in tiles, into buffers that are already there."""
    hidden, weight = case["hidden"], case["weight"]
    (rows, _), (vocab, _) = hidden.shape, weight.shape
    logits = hidden.new_zeros(min(rows, row_tile), min(vocab, vocab_tile))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run(gradients: bool) -> None:
        for r in range(0, rows, row_tile):
            for v in range(0, vocab, vocab_tile):
                h, w = hidden[r : r + row_tile], weight[v : v + vocab_tile]
                z = logits.view(-1)[: len(h) * len(w)].view(len(h), len(w))
                torch.mm(h, w.T, out=z)
                if gradients:
                    d_hidden[r : r + row_tile].addmm_(z, w)
                    d_weight[v : v + vocab_tile].addmm_(z.T, h)
        d_hidden.zero_()
        d_weight.zero_()

    return functools.partial(run, False), functools.partial(run, True)


def seconds(case: Case, repeats: int, device: str) -> tuple[dict[str, float], dict[int, float]]:
    """Median seconds of each way, and of 3 and 4 matmuls, taken in turns."""
    tiles = TILES[device]
    floors = [matmuls(case, tiles.rows, tiles.columns), matmuls(case, 1 << 30, 1 << 30)]
    taken: dict[str, list[float]] = {name: [] for name in ways(device)}
    least: dict[int, list[float]] = {3: [], 4: []}
    for repeat in range(repeats + 1):
        pairs = [tuple(clock(run, device) for run in floor) for floor in floors]
        for name, (way, _) in ways(device).items():
            second = clock(functools.partial(way, case), device)
            if repeat:  # the first round warms up
                taken[name].append(second)
        if repeat:
            for count in least:
                least[count].append(min((count - 3) * f + all_three for f, all_three in pairs))
    medians = {name: statistics.median(t) for name, t in taken.items()}
    return medians, {count: statistics.median(t) for count, t in least.items()}


def observed(way: Callable[[Case], Answer], case: Case) -> tuple[Answer, float]:
    """The answer, and most MiB of tensors alive at once above the inputs and the two gradients."""
    gradients = case["hidden"].nbytes + case["weight"].nbytes
    if case["hidden"].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        got = way(case)
        return got, (torch.cuda.max_memory_allocated() - before - gradients) / 2**20
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        got = way(case)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return got, (peak - gradients) / 2**20


def exact(case: Case, entropy_too: bool) -> Answer:
    """fp64 autograd, a few rows at a time."""
    double = {k: x.double() if x.is_floating_point() else x for k, x in case.items()}
    hidden, weight = leaves(double)
    logprobs, entropies = [], []
    for r in range(0, len(hidden), 128):
        rows = slice(r, r + 128)
        table = torch.log_softmax(hidden[rows] @ weight.T, dim=-1)
        entropy = -(table.exp() * table).sum(-1)
        logprob = table.gather(1, case["targets"][rows, None])[:, 0]
        objective = (logprob * double["d_logprob"][rows]).sum()
        if entropy_too:
            objective = objective + (entropy * double["d_entropy"][rows]).sum()
        objective.backward()
        logprobs.append(logprob.detach())
        entropies.append(entropy.detach())
    return answer(hidden, weight, torch.cat(logprobs), torch.cat(entropies))


def errors(got: Answer, want: Answer) -> list[float]:
    """log-prob and entropy absolute, the gradients relative to the largest entry."""
    apart = [float((g - w).abs().max()) for g, w in zip(got, want, strict=True)]
    scale = [1.0, 1.0, *(float(w.abs().max()) for w in want[2:])]
    return [a / s for a, s in zip(apart, scale, strict=True)]


def targets(dim: int, device: str) -> dict[str, float]:
    """Way -> most seconds over those of its matmuls."""
    if device == "cuda":
        return {"general, kernels": 1.39 if dim < 4096 else 1.28}
    return {"general": 1.30 if dim < 1024 else 1.20, "gradient in forward": 1.35}


def report(rows: int, dim: int, vocab: int, repeats: int, check: bool, device: str) -> None:
    """Print one line per way."""
    case = make_case(rows, dim, vocab, device)
    taken, floor = seconds(case, repeats, device)
    wants = {both: exact(case, both) for both in (True, False)} if check else {}
    bar = targets(dim, device)
    for name, (way, count) in ways(device).items():
        target = f"{bar[name]:.2f}" if name in bar else "-"
        got, extra = observed(way, case)
        line = (
            f"{dim:>6}{vocab:>8}{rows:>6}  {name:<21}{taken[name]:>8.3f}{count:>8}"
            f"{taken[name] / floor[count]:>8.2f}{target:>8}{extra:>9.1f}"
        )
        if check:
            far = errors(got, wants[name != "gradient in forward"])
            line += "".join(f"{e:>9.1e}" for e in far)
        print(line, flush=True)


def main() -> None:
    """Print a table, one block per hidden size and vocabulary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--no-errors", action="store_true", help="skip the slow fp64 comparison")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device: use --device cpu")
    torch.set_num_threads(1)
    print(
        f"{'hidden':>6}{'vocab':>8}{'rows':>6}  {'way':<21}{'s':>8}{'matmuls':>8}{'x':>8}"
        f"{'target':>8}{'MiB':>9}{'logprob':>9}{'entropy':>9}{'d_hid':>9}{'d_wei':>9}"
    )
    rows = args.rows or (8192 if cuda else 1024)
    for dim in args.hidden or ([2048, 4096] if cuda else [512, 1024]):
        for vocab in args.vocab or ([151_936] if cuda else [32_768, 151_936]):
            report(rows, dim, vocab, args.repeats, not args.no_errors, args.device)


if __name__ == "__main__":
    main()
