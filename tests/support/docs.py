"""Fenced blocks of Markdown files, and what can be checked of a command without running it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from rest_mega import cli
from rest_mega.config import EXTENSIBLE, RunConfig, known_keys

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(
    r"^\s*(?:[A-Z_]+=\S* +)*(?:\.venv|python3?|make|rest-mega|torchrun|pip|sbatch|srun|bash"
    r"|(?:examples|tools|benchmarks)/\S+\.(?:sh|py))\s"
)
"""A line that is a command of ours, wherever it stands."""
TOLD = re.compile(r"^<!-- (run|run: (?:slow|engine|gpu)|check: .+) -->$")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_]*\b|\.\.\.|\$\{?\w+\}?|<\w+>")
"""CONFIG.yaml, RUN, ..., $s: what a reader fills in."""
FOREIGN = {
    "cat", "cd", "cp", "curl", "echo", "export", "git", "ls", "mkdir", "nvidia-smi", "pip",
    "rm", "sbatch", "scancel", "set", "source", "squeue", "srun", "ssh", "tar", "tensorboard",
    "unzip", "wandb",
}  # fmt: skip
"""Programs that are not ours: the paths of the repository among their words must exist."""
GLUE = frozenset(("do", "done", "then", "fi", "else"))


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and what is told of it before."""

    file: str
    line: int
    language: str
    told: str
    text: str

    @property
    def place(self) -> str:
        """path:line of the fence."""
        return f"{self.file}:{self.line}"

    @cached_property
    def commands(self) -> list[list[str]]:
        """The words of every command of a bash block, comments and loops taken off."""
        plain = re.sub(r"(?m)(^|\s)#.*$", "", self.text).replace("\\\n", " ")
        found = (shlex.split(line) for line in re.split(r"\n|&&|;(?=\s|$)", plain))
        return [words for line in found if (words := _command(line))]


def blocks(path: Path, text: str | None = None) -> list[Block]:
    """Every fenced block of a file (or of `text`); AssertionError for a fence that stays open."""
    found: list[Block] = []
    lines = (path.read_text("utf-8") if text is None else text).splitlines()
    told, start, name = "", 0, path.relative_to(ROOT).as_posix()
    for number, line in enumerate(lines, start=1):
        fence = re.match(r"^\s*```(\w*)", line)
        if fence and not start:
            start, language = number, fence[1]
        elif fence:
            inside = "".join(f"{one}\n" for one in lines[start : number - 1])
            found.append(Block(name, start, language, told, inside))
            start, told = 0, ""
        elif not start and line.strip():
            comment = TOLD.match(line)
            told = comment[1] if comment else ""
    assert not start, f"{name}:{start}: the fence is not closed"
    return found


def stray_commands(path: Path, text: str | None = None) -> list[str]:
    """Commands in indented blocks, or in fences that are not bash: nobody would check them."""
    text = path.read_text("utf-8") if text is None else text
    lines, strays = text.splitlines(), []
    fenced = {b.line + n: b for b in blocks(path, text) for n in range(b.text.count("\n") + 2)}
    for number, line in enumerate(lines, start=1):
        block = fenced.get(number)
        outside = block is None and not line.startswith("    ")
        if not outside and (block is None or block.language in ("", "text")) and is_command(line):
            strays.append(f"{path.name}:{number}: {line}")
    return strays


def is_command(line: str) -> bool:
    """The line begins with a program of ours."""
    return bool(COMMAND.match(f"{line} "))


def _command(words: list[str]) -> list[str]:
    """A command without assignments before it and the keywords of a loop."""
    while words and (words[0] in GLUE or re.match(r"^\w+=", words[0])):
        words = words[1:]
    return [] if words and words[0] in ("for", "while", "if") else words


# ------------------------------------------------------------------ checks without running


def check_command(words: list[str]) -> None:
    """AssertionError (or the package's own ConfigError) for a command that could not run."""
    program, rest = re.sub(r"^(\./)?(\.venv(-sglang)?/bin/)?", "", words[0]), words[1:]
    if program == "torchrun":
        program, rest = _launched(rest)
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        program, rest = ("rest-mega" if rest[1] == "rest_mega" else rest[1]), rest[2:]
    if program in ("python", "python3") and rest and rest[0].endswith(".py"):
        program, rest = rest[0], rest[1:]
    if program == "rest-mega":
        _check_verb(rest)
    elif program == "make":
        _check_make(rest)
    elif program.endswith((".py", ".sh")):
        _check_script(program, rest)
    else:
        known = program in FOREIGN or program.startswith(("sglang", "pytest"))
        assert known, f"nobody knows how to check {program!r}"
        check_paths(" ".join(rest))


def _launched(words: list[str]) -> tuple[str, list[str]]:
    """What torchrun starts: (program, words)."""
    script = next((n for n, w in enumerate(words) if w == "-m" or w.endswith(".py")), None)
    assert script is not None, f"torchrun {' '.join(words)} starts nothing"
    return (
        ("python", words[script:])
        if words[script] == "-m"
        else (words[script], words[script + 1 :])
    )


def _check_verb(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "VERB", "keys"):
        return
    verb = "eval --suite" if words[0] == "eval" and "--suite" in words else words[0]
    assert verb in {**cli.VERBS, **cli.OWN_WORDS}, f"unknown verb {verb}"
    if verb in cli.OWN_WORDS:
        module = ROOT / (cli.OWN_WORDS[verb][0].replace(".", "/") + ".py")
        return _check_options(module, words[1:])
    if "--dry-run" in words:
        return _check_options(ROOT / "rest_mega" / "dry_run.py", words[2:])
    path = ROOT / words[1]
    if PLACEHOLDER.search(words[1]) or words[1].startswith("runs/"):
        return check_overrides(words[2:])
    check_overrides(words[2:], cli.read_yaml(path))


def check_overrides(words: list[str], tree: dict[str, object] | None = None) -> None:
    """section.key=value words: known keys, and values that are allowed where they are given."""
    tree = {} if tree is None else tree
    shown = [w for w in words if not (w.startswith("[") or w.endswith("]") or w == "...")]
    for key, value in cli.overrides(
        [w for w in shown if not re.fullmatch(r"\$@|\S*/\S+\.jsonl", w)]
    ):
        if PLACEHOLDER.search(str(value)):
            assert key in known_keys(), f"unknown config key {key}"
        else:
            cli.lay_over(tree, key, value)
    _check_tree(tree)


def _check_tree(tree: dict[str, object]) -> None:
    """A config, whose names are shipped unless it loads the example that adds some."""
    config = RunConfig.from_dict(tree)
    if "examples/algorithm/mine.py" not in config.environment.modules:
        config.check_names(EXTENSIBLE)


def _check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        name, given, value = word.partition("=")
        assert given or name in targets, f"make has no target {name}"
        if name == "ARGS" and "quickstart" in words:
            _check_script("examples/quickstart/run.sh", shlex.split(value))


def _check_script(name: str, words: list[str]) -> None:
    path = ROOT / name
    assert path.is_file(), f"{name} does not exist"
    if path.suffix == ".py":
        return _check_options(path, words)
    config = path.with_name("config.yaml")
    if config.is_file():
        check_overrides(words, cli.read_yaml(config))


def _check_options(source: Path, words: list[str]) -> None:
    """Every --option stands in the script, or in a module beside it that it imports."""
    text = source.read_text("utf-8")
    beside = (source.with_name(f"{m}.py") for m in re.findall(r"^import (\w+)$", text, re.M))
    text += "".join(module.read_text("utf-8") for module in beside if module.is_file())
    for option in (w.split("=")[0] for w in words if w.startswith("--")):
        assert f'"{option}"' in text, f"{source.name} knows no {option}"


def check_paths(text: str) -> None:
    """Paths of the repository that a text names exist."""
    for path in re.findall(
        r"(?<![\w./-])((?:rest_mega|examples|docs|tests|benchmarks|tools)/[\w./-]*\w)", text
    ):
        assert (ROOT / path).exists(), f"{path} does not exist"


def check_yaml(block: Block) -> None:
    """A YAML block is a part of a config."""
    tree = yaml.load(block.text, Loader=cli._StrictLoader)
    assert isinstance(tree, dict), f"{block.place}: not sections of a config"
    _check_tree(tree)
