"""The plan of the house holds: who imports whom, who touches what, and the trees that docs draw.

Read from the sources with `ast`; nothing of the package is imported here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rest_mega"
FILES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in FILES}
TREES = {name: ast.parse(text, name) for name, text in SOURCES.items()}

GROUND = {"config", "records", "launch"}
"""Modules that import nothing of the package but each other; everyone may import them."""
ARROWS: dict[str, set[str]] = {
    "dialects": set(),
    "telemetry": set(),
    "kernels": set(),
    "data": {"dialects"},
    "environments": {"dialects"},
    "rewards": {"dialects"},
    "credit": {"dialects"},
    "losses": {"kernels"},
    "rollout": {"data", "dialects", "environments"},
    "trainer": {"losses"},
    "sync": {"trainer", "rollout"},
    "planning": {"sync", "trainer"},
    "diagnosis": {"trainer", "rollout"},
    "evaluation": {"trainer", "rollout", "rewards", "data", "dialects", "environments"},
}
"""Room -> the rooms it may import besides itself and the ground; downwards only."""
TOP = {
    "__main__", "assemble", "benchmark", "cli", "compare", "convert", "doctor", "dry_run", "dump",
    "evaluate", "guard", "nonfinite", "plan", "replay", "rollout_step", "run_directory", "session",
    "sft", "step_metrics", "stop", "tail", "train", "watchdog",
}  # fmt: skip
"""Modules that put rooms together; no room imports them."""
UNPICKLER = "trainer/checkpoint_pickles.py"
"""The one file that reads a pickle: torch.distributed.checkpoint's description of a checkpoint."""
PURE = ("data", "dialects", "environments", "rewards", "credit", "losses", "kernels")
NARROW = {
    "sync": {"rollout.engine"},
    "planning": {"trainer.model", "trainer.parallel", "sync.names"},
    "diagnosis": {"trainer.parallel", "trainer.device", "rollout.sglang_client"},
    "evaluation": {"trainer.parallel", "rollout.collect", "rollout.engine"},
}
"""Room -> the only modules of higher-standing rooms (rollout, trainer) it may know, where not all;
sync may use any of trainer."""


def imports(tree: ast.AST, package: str = "rest_mega") -> Iterator[str]:
    """Dotted names that a file imports, wherever in the file: `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module} in {package}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> list[str]:
    """What a file imports of the package, without the package's name."""
    found = [dotted for dotted in imports(TREES[name]) if dotted.split(".")[0] == "rest_mega"]
    return [dotted.removeprefix("rest_mega").removeprefix(".") for dotted in found]


def room(name: str) -> str:
    """The room of a file, or the module's own name for those at the top."""
    return name.split("/")[0].removesuffix(".py")


def users(word: str) -> set[str]:
    """Files that import `word` or something below it."""
    return {
        name
        for name, tree in TREES.items()
        if any(dotted == word or dotted.startswith(f"{word}.") for dotted in imports(tree))
    }


def names_in(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(object, attribute) of every plain `object.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


def exists(dotted: str) -> bool:
    """A dotted name of the package is a module, or stands at the top of one."""
    *rest, last = dotted.split(".")[1:] or [""]
    folder = "/".join(rest)
    if not last or {f"{folder}/{last}.py".lstrip("/"), f"{folder}/{last}/__init__.py"} & {*TREES}:
        return True
    tree = TREES.get(f"{folder}.py") or TREES.get(f"{folder}/__init__.py".lstrip("/"))
    return tree is not None and last in set(at_top(tree.body))


def at_top(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module binds."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.If | ast.Try):
            yield from at_top(node.body)
        else:
            yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            yield from (n.asname or n.name for n in ast.walk(node) if isinstance(n, ast.alias))


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tools", "tests"])
def test_scripts_import_what_the_package_has(folder: str) -> None:
    """Most of them no test runs."""
    wanted = {
        (path.name, dotted)
        for path in (ROOT / folder).rglob("*.py")
        for dotted in imports(ast.parse(path.read_text("utf-8")))
        if dotted.split(".")[0] == "rest_mega"
    }
    assert wanted
    assert not [one for one in sorted(wanted) if not exists(one[1])]


def test_every_file_has_a_place_in_the_plan() -> None:
    assert {room(name) for name in SOURCES} == {"__init__", *GROUND, *ARROWS, *TOP}


def test_arrows_point_downwards() -> None:
    order = list(ARROWS)
    for upper, lower in ARROWS.items():
        assert all(order.index(one) < order.index(upper) for one in lower), upper


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_imports_only_what_lies_below_it(name: str) -> None:
    here = room(name)
    if here in TOP:
        return
    allowed = GROUND if here in GROUND else GROUND | {here} | ARROWS.get(here, set())
    for dotted in own(name):
        assert dotted.split(".")[0] in allowed, f"{name} imports rest_mega.{dotted}"


@pytest.mark.parametrize("here", NARROW)
def test_rooms_know_only_these_doors_of_the_floor_below(here: str) -> None:
    floor = {
        "sync": {"rollout"},
        "planning": {"trainer", "sync"},
        "diagnosis": {"trainer", "rollout"},
        "evaluation": {"rollout", "trainer"},
    }[here]
    for name in SOURCES:
        for dotted in own(name) if room(name) == here else ():
            parts = dotted.split(".")
            if parts[0] in floor:
                assert ".".join(parts[:2]) in NARROW[here], f"{name} imports {dotted}"


def test_the_trainer_knows_no_rewards_and_no_credit() -> None:
    seen = {
        dotted.split(".")[0] for name in SOURCES if room(name) == "trainer" for dotted in own(name)
    }
    assert not seen & {"rewards", "credit", "environments", "data", "dialects"}


@pytest.mark.parametrize("name", [name for name in SOURCES if room(name) in PURE])
def test_pure_rooms_touch_neither_megatron_nor_the_environment_nor_logging(name: str) -> None:
    heads = {dotted.split(".")[0] for dotted in imports(TREES[name])}
    assert not heads & {"megatron", "sglang", "logging"}
    assert not {"environ", "getenv"} & {a for o, a in names_in(TREES[name]) if o == "os"}


def test_megatron_is_imported_by_trainer_and_sync_alone() -> None:
    assert {room(name) for name in users("megatron")} <= {"trainer", "sync"}


def test_triton_is_loaded_where_its_kernels_are_asked_for() -> None:
    assert users("triton") == {"kernels/head.py"}
    for name, tree in TREES.items():
        at_import = ast.Module(
            [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        )
        assert "rest_mega.kernels.head" not in set(imports(at_import)), name


def test_no_string_names_megatron_elsewhere() -> None:
    naming = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.match(r"megatron\.\w", node.value)
    }
    assert naming == {"trainer/device.py"}


def test_parallel_state_has_one_reader() -> None:
    readers = {
        name
        for name, tree in TREES.items()
        if any("parallel_state" in dotted.split(".") for dotted in imports(tree))
        or ("mpu" in {o for o, _ in names_in(tree)})
        or any(attribute == "parallel_state" for _, attribute in names_in(tree))
    }
    assert readers == {"trainer/parallel.py"}


def test_the_environment_variables_have_one_reader() -> None:
    readers = {
        name
        for name, tree in TREES.items()
        if {"environ", "getenv", "putenv"} & {a for o, a in names_in(tree) if o == "os"}
        or {"os.environ", "os.getenv"} & set(imports(tree))
    }
    assert readers == {"launch.py"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_global_state(name: str) -> None:
    assert not [n for n in ast.walk(TREES[name]) if isinstance(n, ast.Global)]


def test_the_sole_unpickler_is_one_that_refuses_names_it_does_not_know() -> None:
    tree = TREES[UNPICKLER]
    used = {attribute for owner, attribute in names_in(tree) if owner == "pickle"}
    assert used == {"Unpickler", "UnpicklingError"}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(base) for node in classes for base in node.bases] == ["pickle.Unpickler"]
    methods = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert "find_class" in methods


PICKLES = "rollout/sglang_wire.py"
"""Writes a pickle, which SGLang's route for tensors takes; reads none."""


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_unpickled_or_evaluated(name: str) -> None:
    tree = TREES[name]
    heads = {dotted.split(".")[0] for dotted in imports(tree)}
    heads -= {"pickle"} if name == UNPICKLER else set()
    if name == PICKLES:
        assert {dotted for dotted in imports(tree) if "pickle" in dotted} == {"pickle"}
        assert {a for o, a in names_in(tree) if o == "pickle"} == {"Pickler"}
        heads.remove("pickle")
    assert not heads & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name):
            assert call.func.id not in ("eval", "exec", "compile"), f"line {call.lineno}"
        if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            place = (call.func.value.id, call.func.attr)
            safe = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            assert place != ("torch", "load") or safe.get("weights_only") is True
            assert place != ("np", "load") or safe.get("allow_pickle") is False
            assert place != ("yaml", "load") or "Loader" in safe


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_begins_by_saying_what_it_is_for(name: str) -> None:
    docstring = ast.get_docstring(TREES[name])
    assert docstring, name
    assert docstring[0] not in " \n"


def test_the_package_never_imports_what_stands_around_it() -> None:
    outside = {"tools", "examples", "tests", "benchmarks"}
    for name, tree in TREES.items():
        assert not outside & {dotted.split(".")[0] for dotted in imports(tree)}, name


@pytest.mark.parametrize("module", ["rest_mega", "rest_mega.config", "rest_mega.records"])
def test_the_ground_loads_neither_torch_nor_megatron(module: str) -> None:
    code = (
        f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}} & "
        "{'torch', 'megatron', 'transformers', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_command_line_answers_without_torch() -> None:
    code = (
        "import sys; from rest_mega.cli import main; code = main(['train', 'absent.yaml']); "
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2 False", done.stderr


# ------------------------------------------------------------------ the trees that docs draw


def listed(readme: str) -> set[str]:
    """Paths below rest_mega/ in the fenced block that begins with the line `rest_mega/`: one
    `name.py  text` or `room/  text` a line, two spaces deeper per level."""
    blocks = re.findall(r"^```[^\n]*\n(rest_mega/.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"{len(blocks)} blocks begin with rest_mega/"
    folders: list[str] = []
    found = set()
    for line in blocks[0].splitlines()[1:]:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip(" "))) // 2
        name = line.split()[0]
        assert 1 <= depth <= len(folders) + 1, f"{line!r} is indented by {depth} levels"
        folders = folders[: depth - 1]
        path = "".join(folders) + name
        assert path not in found, f"{path} is listed twice"
        assert len(line.split()) > 1, f"{line!r} says nothing of the file"
        found.add(path)
        if name.endswith("/"):
            folders.append(name)
    return found


def real() -> set[str]:
    """Every file and room of the package; a room's line speaks for its __init__.py."""
    paths = [p.relative_to(PACKAGE) for p in PACKAGE.rglob("*") if p.suffix != ".pyc"]
    return {
        p.as_posix() + ("/" if (PACKAGE / p).is_dir() else "")
        for p in paths
        if "__pycache__" not in p.parts and (p.name != "__init__.py" or len(p.parts) == 1)
    }


def test_a_tree_is_read_as_it_is_drawn() -> None:
    tree = "rest_mega/\n  cli.py  words\n  data/  files\n    chat.py  ids\n  z.py  end\n"
    text = f"# Title\n```\n{tree}```\n"
    assert listed(text) == {"cli.py", "data/", "data/chat.py", "z.py"}


def test_the_real_tree_has_rooms_files_and_no_caches() -> None:
    found = real()
    assert {"cli.py", "__init__.py", "data/", "data/templates/hermes.jinja"} <= found
    assert {path for path in found if path.endswith(".py")} == {
        name for name in SOURCES if not name.endswith("/__init__.py")
    }


def test_the_tree_is_drawn_as_it_is() -> None:
    """docs/tree.md has every file, the README the top files and the rooms."""
    assert listed((ROOT / "docs" / "tree.md").read_text("utf-8")) == real()
    top = {path for path in real() if "/" not in path.removesuffix("/")}
    assert listed((ROOT / "README.md").read_text("utf-8")) == top
