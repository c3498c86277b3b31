"""The rules of the house: who may import whom, how long a file may be, who may touch files, hooks and wandb."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# A stage may import itself and the stages to its left.
STAGES = [
    *("errors", "types", "config", "checkpoint", "targets", "tokens", "activations", "decompositions", "training"),
    *("evaluation", "interpretation", "circuits", "interop", "browser", "report", "build", "face", "run"),
]
CORE = sorted((REPO / "nndecomp").rglob("*.py"))
EXPERIMENTS = sorted((REPO / "experiments").rglob("*.py"))
ALL = [*CORE, *EXPERIMENTS]

# Slow to import: only inside functions, or in modules that nothing imports at the start.
HEAVY = {"transformers", "datasets", "wandb", "transformer_lens", "pandas", "matplotlib", "scipy"}

WANDB = {"nndecomp/training/log.py", "nndecomp/targets/wandb_runs.py"}
HOOKS = {"nndecomp/targets/hooks.py"}
# Where files are written. Everything else returns values.
WRITERS = {
    "nndecomp/activations/store_writer.py",
    "nndecomp/checkpoint.py",
    "nndecomp/decompositions/backends/compiled.py",  # what it compiles, in the user's cache
    "nndecomp/decompositions/pretrained.py",
    "nndecomp/evaluation/rows.py",
    "nndecomp/report/style.py",
    "nndecomp/run.py",
    "nndecomp/targets/llama_simple_mlp.py",
    "nndecomp/targets/wandb_runs.py",
    "nndecomp/tokens/tokenizer.py",
    "nndecomp/training/log.py",
    "nndecomp/training/state.py",
}
WRITING = {
    *("write_text", "write_bytes", "touch", "mkdir", "makedirs", "unlink", "rmtree", "rename", "replace", "symlink_to"),
    *("save", "save_file", "save_model", "savefig", "dump", "to_parquet", "to_csv", "to_json", "tofile", "copytree"),
}
OPENED_FOR_WRITING = {kind + b + plus for kind in "wax" for b in ("", "b", "t") for plus in ("", "+")} | {"r+", "rb+"}
# Calls with which importing would do something, rather than define it.
ACTS = {
    *("print", "open", "load", "loads", "read_text", "read_bytes", "from_pretrained", "glob", "rglob", "getenv", "run"),
    *(
        "manual_seed",
        "seed",
        "basicConfig",
        "register",
        "store",
        "set_num_threads",
        "set_default_dtype",
        "simplefilter",
    ),
    *("filterwarnings", "setdefault", "update", "init", "register_new_resolver"),
}
VAGUE = {"utils", "util", "helpers", "helper", "manager", "managers", "misc", "common"}


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def stage(path: Path) -> str:
    return path.relative_to(REPO / "nndecomp").with_suffix("").parts[0]


def module(path: Path) -> str:
    return name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def where(path: Path, node: ast.AST) -> str:
    return f"{name(path)}:{getattr(node, 'lineno', '?')}"


def imports(path: Path) -> set[str]:
    """Everything that a file imports, inside functions too, by full dotted name."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {imported.split(".")[0] for imported in imports(path)}


def calls(node: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call under `node`, with the last part of the name of what is called."""
    for child in ast.walk(node):
        if isinstance(child, ast.Call):
            match child.func:
                case ast.Attribute(attr=called) | ast.Name(id=called):
                    yield called, child


def none(faults: Iterable[str]) -> None:
    found = list(faults)
    assert not found, "\n".join(found)


def test_a_stage_imports_only_earlier_stages():
    for path in CORE:
        if path == REPO / "nndecomp/__init__.py":
            continue
        assert stage(path) in STAGES, f"{name(path)} belongs to no stage of {', '.join(STAGES)}"
        used = {imported.split(".")[1] for imported in imports(path) if imported.startswith("nndecomp.")}
        later = used - set(STAGES[: STAGES.index(stage(path)) + 1])
        assert not later, f"{name(path)} reaches forward to {later}"


def test_imports_are_absolute():
    none(
        f"{where(path, node)} has a relative import"
        for path in ALL
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level
    )


def test_an_experiment_imports_no_other_experiment():
    folders = {path.parent for path in EXPERIMENTS}
    siblings = {"experiments"} | {folder.name for folder in folders} | {path.stem for path in EXPERIMENTS}
    none(f"{name(path)} imports {packages(path) & siblings}" for path in EXPERIMENTS if packages(path) & siblings)


def test_the_core_imports_no_experiment():
    none(f"{name(path)} imports an experiment" for path in CORE if "experiments" in packages(path))


def test_files_stay_small():
    lines = {path: len(path.read_text().splitlines()) for path in ALL}
    limits = {path: 300 if path in CORE else 150 for path in ALL}
    none(f"{name(path)} has {lines[path]} lines, over {limits[path]}" for path in ALL if lines[path] > limits[path])


def test_names_say_what_is_in_a_file():
    none(f"{name(path)}: a vague name" for path in ALL if set(re.split(r"[/._]", name(path))) & VAGUE)


def acting(path: Path) -> Iterator[str]:
    for node in tree(path).body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                pass
            case ast.Expr(value=ast.Constant(value=str())) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                pass
            case ast.Assign() | ast.AnnAssign():
                if acts := {called for called, _ in calls(node)} & ACTS:
                    yield f"{where(path, node)} calls {acts} when it is imported"
            case _:
                yield f"{where(path, node)}: importing runs a {type(node).__name__} statement"


def test_the_top_level_only_imports_and_defines():
    none(fault for path in CORE for fault in acting(path))


def test_exceptions_are_caught_by_name():
    for path in ALL:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{where(path, node)} has a bare except"
                caught = {child.id for child in ast.walk(node.type) if isinstance(child, ast.Name)}
                assert not caught & {"Exception", "BaseException"}, f"{where(path, node)} catches everything"


def test_wandb_is_touched_in_two_files():
    none(f"{name(path)} imports wandb" for path in ALL if "wandb" in packages(path) and name(path) not in WANDB)


def test_hooks_are_placed_in_one_file():
    none(
        f"{where(path, call)} places a hook"
        for path in ALL
        if name(path) not in HOOKS
        for called, call in calls(tree(path))
        if re.fullmatch(r"register_\w*(forward|backward)\w*", called)
    )


def writing(path: Path) -> Iterator[str]:
    ours = {imported.split(".")[-1] for imported in imports(path) if imported.startswith("nndecomp.")}
    for called, call in calls(tree(path)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) in ours:  # asks another file to write
            continue
        # Path.replace has one argument; str.replace has two, dataclasses.replace has keywords. to_csv() returns text.
        other = called == "replace" and (len(call.args) != 1 or call.keywords) or called == "to_csv" and not call.args
        if isinstance(call.func, ast.Attribute) and called in WRITING and not other:
            yield f"{where(path, call)} writes a file ({called})"
        if called == "open":
            modes = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            if {mode.value for mode in modes if isinstance(mode, ast.Constant)} & OPENED_FOR_WRITING:
                yield f"{where(path, call)} opens a file for writing"


def test_files_are_written_in_few_places():
    none(fault for path in CORE if name(path) not in WRITERS for fault in writing(path))


def test_weights_are_never_code():
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal"}
    none(f"{name(path)} imports {packages(path) & unsafe}" for path in ALL if packages(path) & unsafe)
    for path in ALL:
        for _, call in calls(tree(path)):
            if ast.unparse(call.func) == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                assert safe, f"{where(path, call)}: torch.load without weights_only=True runs what the file says"


def run_python(program: str) -> str:
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPO)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def loaded_after(statement: str) -> set[str]:
    """Top-level names of all modules that `statement` loads."""
    return set(run_python(f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})").split())


def test_importing_the_package_loads_no_torch():
    assert not loaded_after("import nndecomp") & {"torch", *HEAVY}


def test_settings_need_no_torch():
    modules = [module(path) for path in CORE if stage(path) == "config"]
    assert not loaded_after(f"import {', '.join(modules)}") & {"torch", *HEAVY}


@pytest.mark.parametrize("start", ["nndecomp.run", "nndecomp.build"])
def test_a_run_starts_without_the_heavy_libraries(start: str):
    loaded = loaded_after(f"import {start}") & HEAVY
    assert not loaded, f"import {start} loads {loaded}: import them where they are used"


def importable(path: Path) -> bool:
    """Kernels for GPUs want an optional package."""
    return not path.name.startswith("triton_") or importlib.util.find_spec("triton") is not None


def test_importing_is_silent():
    said = run_python(f"""
import importlib, random, sys

sys.dont_write_bytecode = True
import numpy, torch

def no_files(event, args):
    if event == "open":
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
            assert not frame.f_code.co_filename.startswith("{REPO}/nndecomp/"), f"{{frame}} opens {{args[0]}}"
            frame = frame.f_back

def state():
    return torch.get_rng_state().tolist(), random.getstate(), torch.get_num_threads(), torch.is_grad_enabled()

sys.addaudithook(no_files)
before = state()
for module in {[module(path) for path in CORE if importable(path)]}:
    importlib.import_module(module)
assert state() == before, "importing changes global state"
""")
    assert said == "", f"importing prints {said!r}"
