"""Equal findings are told once, with the ranks that have them."""

from __future__ import annotations

from rest_mega.diagnosis.findings import (
    ERROR,
    OK,
    Finding,
    disagreements,
    dumps,
    lines,
    loads,
    merged,
    told,
)

SAME = Finding(OK, "packages", "all there")
BAD = Finding(ERROR, "disk", "full", "empty it")


def test_equal_findings_are_one_with_all_their_ranks() -> None:
    found = merged([loads(dumps(report)) for report in ([SAME], [SAME, BAD], [SAME, BAD])])
    assert found == {SAME: [0, 1, 2], BAD: [1, 2]}
    assert lines(found, 3) == [
        "ok      packages  all there",
        "error   disk      full [rank 1-2]",
        "                  -> empty it",
    ]


def test_long_texts_are_folded() -> None:
    text = " ".join(["word"] * 60)
    written = lines({Finding(OK, "x", text): [0]}, 1, width=60)
    assert max(map(len, written)) <= 60
    assert " ".join(line[11:] for line in written) == text


def test_spans_of_ranks() -> None:
    assert told([7, 0, 1, 2, 5]) == "rank 0-2, 5, 7"


def test_ranks_that_differ_are_told_so() -> None:
    unlike = Finding(ERROR, "versions", "differ", "use one image")
    two = [Finding(OK, "versions", name) for name in ("torch 2.13", "torch 2.12")]
    assert disagreements(merged([[two[0]], [two[1]]]), [unlike]) == [unlike]
    assert disagreements(merged([[two[0]], [two[0]]]), [unlike]) == []
