"""The report in a real browser: it loads, filters, recolours, compares, and its console stays
empty."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rest_mega.telemetry.report import write_report
from tests.support.browser import Browser, chromium
from tests.support.pages import synthetic_run

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium here: install Debian's package, or run `make browser`"
)

HOSTILE = '</script><img src=x onerror="window.owned = 1"><script>window.owned = 1</script>'
COUNT, TOKENS = 1000, 90
ROW = "document.querySelector('.list .row.on')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    with Browser(folder / "profile") as opened:
        yield opened


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    """The trajectories of a run of a thousand, the first of each step with hostile texts."""
    call = {"name": "add", "arguments": {"a": HOSTILE}}
    outcome = {"status": "ok", "content": HOSTILE, "seconds": 0.25}
    turn = {"start": 60, "well_formed": True, "ended": True, "calls": [call], "outcomes": [outcome]}
    run = synthetic_run(folder / "run", COUNT, TOKENS, turns=[turn], kind=HOSTILE)
    return [json.loads(line) for line in (run / "trajectories.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def page(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_report(folder / "run")


@pytest.fixture
def shown(browser: Browser, page: Path) -> Iterator[Browser]:
    """The trajectories of the page; what the console said fails the test."""
    browser.errors.clear()
    browser.open(page, "#trajectories")
    yield browser
    assert browser.errors == []


def choose(browser: Browser, select: str, value: str) -> None:
    browser.js(
        f"(() => {{ const s = document.getElementById('{select}'); s.value = '{value}'; "
        "s.dispatchEvent(new Event('change')); })()"
    )


def texts(browser: Browser, selector: str) -> list[str]:
    found = browser.js(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")
    return [str(text) for text in found]


def cells(browser: Browser) -> list[str]:
    """Of the chosen row of the list: step, prompt, sibling, reward, gap, success, ended."""
    return [str(x) for x in browser.js(f"[...{ROW}.children].map(c => c.textContent)")]


def test_a_thousand_trajectories_open_below_20_mb_and_few_rows_exist(
    shown: Browser, page: Path
) -> None:
    assert page.stat().st_size < 20e6
    assert texts(shown, ".pane .soft")[0] == f"{COUNT} of {COUNT}"
    assert 10 < len(texts(shown, ".list .row")) < 100


def test_every_view_shows_the_run(browser: Browser, page: Path) -> None:
    browser.errors.clear()
    browser.open(page)
    browser.wait("document.querySelectorAll('#curves svg path').length > 20")
    titles = texts(browser, "#curves figcaption")
    assert {"Entropy (nats)", "Share of the gradient", "Loss", "policy/own_metric"} <= set(titles)
    browser.press("l")
    bars = browser.js("document.querySelectorAll('#timeline .track i:not(.wait)').length")
    assert bars == 8  # two ranks, two steps, two phases
    table = texts(browser, "#timeline td")
    assert table[table.index("rollout") :][3:5] == ["rank 1 (2.80 s)", "rank 0 (0.0 ms)"]
    browser.press("g")
    assert "run.seed" in texts(browser, "#config code")
    assert browser.errors == []


@pytest.mark.parametrize(
    ("name", "lets_through"),
    [
        ("malformed", lambda n, row: not row["turns"][0]["well_formed"]),
        ("failedcall", lambda n, row: row["turns"][0]["outcomes"][0]["status"] != "ok"),
        ("truncated", lambda n, row: row["stop"] != "answered"),
        ("success", lambda n, row: row["success"]),
        ("failure", lambda n, row: not row["success"]),
    ],
)
def test_filters_let_through_what_they_say(
    shown: Browser, rows: list[dict[str, Any]], name: str, lets_through: Any
) -> None:
    choose(shown, "filter", name)
    want = [row for n, row in enumerate(rows) if lets_through(n, row)]
    assert texts(shown, ".pane .soft")[0] == f"{len(want)} of {COUNT}"
    assert cells(shown)[:3] == [str(want[0][key]) for key in ("step", "prompt", "sibling")]


def test_orders_put_the_worst_reward_and_the_biggest_gap_first(
    shown: Browser, rows: list[dict[str, Any]]
) -> None:
    choose(shown, "order", "worst")
    assert float(cells(shown)[3]) == pytest.approx(min(r["reward"] for r in rows), rel=0.01)
    choose(shown, "order", "gap")
    gaps = [max(map(abs, row["sampled"]["gap"])) for row in rows]
    assert float(cells(shown)[4]) == pytest.approx(max(gaps), rel=0.01)


def test_tokens_are_coloured_by_what_is_asked_for(
    shown: Browser, rows: list[dict[str, Any]]
) -> None:
    row, seen = rows[0], int(TOKENS * 2 / 3)
    assert "".join(texts(shown, ".tokens span[data-t]")) == "".join(row["text"][seen:])
    looks = {}
    first = "document.querySelector('.tokens span[data-t]').getAttribute('style')"
    for number, name in enumerate(("region", "weight", "entropy", "advantage", "mask", "gap"), 1):
        shown.press(str(number))
        looks[name] = (shown.js(first), texts(shown, ".pane .legend")[0])
    assert len({legend for _, legend in looks.values()}) == 6
    assert "tool_name" in looks["region"][1]
    for name in ("weight", "entropy"):
        values = row["sampled"][name]
        low, high = looks[name][1].split(" ")[0], max(values)
        assert float(low[: len(f"{min(values):.4g}")]) == pytest.approx(min(values), rel=0.01)
        brightest = shown.js(
            f"(() => {{ document.getElementById('colour').value = '{name}'; "
            "document.getElementById('colour').dispatchEvent(new Event('change')); "
            "const light = s => (s.match(/[0-9]+/g) || []).slice(0, 3).reduce((a, b) => a + +b, 0);"
            "const all = [...document.querySelectorAll('.tokens span[data-t]')];"
            "return all.map(s => light(s.style.background)); })()"
        )
        assert brightest.index(max(brightest)) == values.index(high)


def test_texts_of_models_and_tools_stay_texts(shown: Browser) -> None:
    assert texts(shown, ".calls td code") == [
        f"add({json.dumps({'a': HOSTILE}, indent=1)})",
        HOSTILE,
    ]
    assert texts(shown, ".calls td")[3] == "250 ms"
    assert HOSTILE in texts(shown, ".pane b")[0]
    assert shown.js("window.owned ?? null") is None
    assert shown.js("document.querySelectorAll('main img').length") == 0


def test_keys_move_walk_search_and_turn_the_lights_off(shown: Browser) -> None:
    shown.press("j")
    assert cells(shown)[1:3] == ["p0", "1"]
    shown.press("k")
    assert cells(shown)[1:3] == ["p0", "0"]
    shown.press("]")
    shown.press("]")
    assert texts(shown, ".tokens .at") == ['{"name": "']
    before = shown.js("getComputedStyle(document.body).backgroundColor")
    shown.press("t")
    assert shown.js("getComputedStyle(document.body).backgroundColor") != before
    shown.js("const s = document.getElementById('search'); s.value = 'p17 ';")
    shown.js("document.getElementById('search').dispatchEvent(new Event('input'))")
    shown.wait(f"{ROW} && {ROW}.children[1].textContent === 'p17'")
    assert texts(shown, ".pane .soft")[0] == f"8 of {COUNT}"


def test_two_runs_stand_side_by_side_and_follow_each_other(
    browser: Browser, folder: Path, page: Path
) -> None:
    browser.errors.clear()
    other = synthetic_run(folder / "other", 64, 30)
    browser.open(write_report(folder / "run", other, path=folder / "two.html"), "#trajectories")
    assert len(texts(browser, ".pane")) == 2
    browser.js("document.querySelectorAll('.pane')[0].querySelectorAll('.list .row')[11].click()")
    chosen = "[...document.querySelectorAll('.list .row.on')].map(r => r.children[1].textContent)"
    assert browser.js(chosen) == ["p1", "p1"]
    browser.press("c")
    browser.wait("document.querySelectorAll('#curves svg path').length > 20")
    loss = "[...document.querySelectorAll('[data-chart=\"Loss\"] path')]"
    browser.js("document.querySelector('[data-chart=\"Loss\"]').scrollIntoView()")
    browser.wait(f"{loss}.length === 2")
    dashes = browser.js(f"{loss}.map(p => p.getAttribute('stroke-dasharray'))")
    assert dashes[0] != dashes[1]  # told apart without colour too
    assert browser.errors == []


def test_a_run_without_trajectories_or_timelines_says_so(browser: Browser, tmp_path: Path) -> None:
    browser.errors.clear()
    (tmp_path / "run.json").write_text('{"regions": ["A"], "config": {}}')
    browser.open(write_report(tmp_path), "#trajectories")
    assert "No trajectory passes these filters." in texts(browser, ".pane p")
    browser.press("l")
    assert "kept no timeline" in texts(browser, "#timeline p")[0]
    assert browser.errors == []
