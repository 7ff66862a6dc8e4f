"""The kinds of task of the quick-start, and the flaws of the assistant who demonstrates them.

A kind draws the values of one task; its `turns` are the calls of each assistant turn. Where a kind
has a flaw, a flawed demonstration follows `flawed` instead: always the same slip, so that a model
that imitates it most of the time is greedy for the slip, and only success tells it better.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Call = tuple[str, dict[str, Any]]
Turns = tuple[tuple[Call, ...], ...]

ITEMS = (
    "apple",
    "bean",
    "corn",
    "egg",
    "fig",
    "kiwi",
    "lime",
    "milk",
    "nut",
    "oat",
    "pear",
    "plum",
    "rice",
    "soap",
)
PEOPLE = ("Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Ida")
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
CONVERSIONS = (
    ("m", "cm", 100),
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("h", "min", 60),
    ("min", "s", 60),
)


@dataclass(frozen=True)
class Task:
    """One task with its right solution, and the flawed one where its kind has a flaw."""

    kind: str
    question: str
    turns: Turns
    answer: int
    stock: Mapping[str, int] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)
    flawed: tuple[Turns, int] | None = None
    """The calls and the answer of the usual slip."""

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The right calls in order, as the rewards know them."""
        return [
            {"name": name, "arguments": arguments}
            for turn in self.turns
            for name, arguments in turn
        ]

    @property
    def digest(self) -> int:
        """A number that depends on kind, calls and answer alone: the same combination, the same
        number."""
        text = json.dumps([self.kind, self.calls, self.answer])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def held_out(self) -> bool:
        """One combination in eight is never trained on."""
        return self.digest % 8 == 0


def calculate(rng: random.Random) -> Task:
    """One calculation from the question."""
    a, b = sorted((rng.randint(10, 89), rng.randint(10, 89)), reverse=True)
    sign, word = rng.choice((("+", "plus"), ("-", "minus")))
    question = rng.choice((f"What is {a} {word} {b}?", f"Work out {a} {word} {b}."))
    answer = a + b if sign == "+" else a - b
    return Task(
        "calculate", question, ((("calculator", {"expression": f"{a}{sign}{b}"}),),), answer
    )


def convert(rng: random.Random) -> Task:
    """One conversion of units; the slip: the units swapped."""
    value = rng.randint(10, 99)
    unit, to, factor = rng.choice(CONVERSIONS)
    question = rng.choice(
        (f"How many {to} are {value} {unit}?", f"Convert {value} {unit} to {to}.")
    )
    flawed = (((_convert(value, to, unit),),), value)
    return Task("convert", question, ((_convert(value, unit, to),),), value * factor, flawed=flawed)


def look(rng: random.Random) -> Task:
    """One look into the stock."""
    stock, (item, _) = _stock(rng)
    question = rng.choice((f"How many {item} are left?", f"Check the {item}."))
    return Task("look", question, ((_get(item),),), stock[item], stock)


def store(rng: random.Random) -> Task:
    """One entry into the stock; the slip: saying it and not doing it."""
    stock, (item, _) = _stock(rng)
    count = rng.randint(10, 99)
    question = rng.choice((f"Set {item} to {count}.", f"There are {count} {item} now."))
    return Task("store", question, ((_set(item, count),),), count, stock, flawed=((), count))


def when(rng: random.Random) -> Task:
    """One look into the calendar."""
    person, day, hour = rng.choice(PEOPLE), rng.choice(DAYS), rng.randint(13, 20)
    question = rng.choice((f"When is {person} free on {day}?", f"Find {person} an hour on {day}."))
    turns: Turns = ((_find(person, day),),)
    return Task("when", question, turns, hour, free={f"{person} {day}": hour})


def change(rng: random.Random) -> Task:
    """Read, compute, write back; the slip: not writing back."""
    stock, (item, _) = _stock(rng)
    if rng.random() < 0.5:
        count, sign = rng.randint(10, 89), "+"
        question = rng.choice((f"Add {count} {item}.", f"{count} more {item} came in."))
    else:
        count, sign = rng.randint(10, stock[item]), "-"
        question = rng.choice((f"Take {count} {item}.", f"{count} {item} were sold."))
    answer = stock[item] + count if sign == "+" else stock[item] - count
    turns = (
        (_get(item),),
        (("calculator", {"expression": f"{stock[item]}{sign}{count}"}),),
        (_set(item, answer),),
    )
    return Task("change", question, turns, answer, stock, flawed=(turns[:2], answer))


def total(rng: random.Random) -> Task:
    """Read two counts at once and add them; the slip: answering the first count."""
    stock, (a, b) = _stock(rng)
    question = rng.choice((f"How many {a} and {b} together?", f"Count {a} plus {b}."))
    turns = ((_get(a), _get(b)), (("calculator", {"expression": f"{stock[a]}+{stock[b]}"}),))
    return Task("total", question, turns, stock[a] + stock[b], stock, flawed=(turns[:1], stock[a]))


def copy(rng: random.Random) -> Task:
    """Read one count and write it for another item; the slip: not writing it."""
    stock, (a, b) = _stock(rng)
    question = rng.choice((f"Make {b} the same as {a}.", f"Give {b} the count of {a}."))
    turns = ((_get(a),), (_set(b, stock[a]),))
    return Task("copy", question, turns, stock[a], stock, flawed=(turns[:1], stock[a]))


def weigh(rng: random.Random) -> Task:
    """Convert and write the result; the slip: writing the number of the question."""
    stock, (item, _) = _stock(rng)
    value = rng.randint(10, 99)
    unit, to, factor = rng.choice(CONVERSIONS)
    question = rng.choice(
        (f"Set {item} to {value} {unit} in {to}.", f"Note {value} {unit} of {item} in {to}.")
    )
    turns = ((_convert(value, unit, to),), (_set(item, value * factor),))
    return Task(
        "weigh", question, turns, value * factor, stock, flawed=(((_set(item, value),),), value)
    )


def meet(rng: random.Random) -> Task:
    """Find a free hour and book it; the slip: booking noon without a look."""
    person, day, hour = rng.choice(PEOPLE), rng.choice(DAYS), rng.randint(13, 20)
    question = rng.choice((f"Book {person} on {day}.", f"Meet {person} on {day}."))
    turns: Turns = (
        (_find(person, day),),
        (("book", {"person": person, "day": day, "hour": hour}),),
    )
    flawed = ((("book", {"person": person, "day": day, "hour": 12}),),)
    return Task("meet", question, turns, hour, free={f"{person} {day}": hour}, flawed=(flawed, 12))


EASY = (calculate, convert, look, store, when)
"""The kinds with one call."""
KINDS: Mapping[str, Callable[[random.Random], Task]] = {
    f.__name__: f for f in (*EASY, change, total, copy, weigh, meet)
}


def _stock(rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """Counts of three items in random order, and two of the items."""
    items = rng.sample(ITEMS, 3)
    return {item: rng.randint(10, 99) for item in items}, rng.sample(items, 2)


def _get(item: str) -> Call:
    return "get", {"item": item}


def _set(item: str, count: int) -> Call:
    return "set", {"item": item, "count": count}


def _find(person: str, day: str) -> Call:
    return "find_slot", {"person": person, "day": day}


def _convert(value: int, unit: str, to: str) -> Call:
    return "convert", {"value": value, "unit": unit, "to": to}
