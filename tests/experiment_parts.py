"""What tests of the harness share: a small random target, and experiments as command lines."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nndecomp.targets.llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, save
from nndecomp.tokens.tokenizer import train_tokenizer

REPO = Path(__file__).parents[1]
EXPERIMENTS = sorted(path.parent.name for path in (REPO / "experiments").glob("exp_*/run.py"))
SWEEPS = sorted(path.stem for path in (REPO / "conf" / "sweep").glob("*.yaml"))
SCALES = sorted(path.stem for path in (REPO / "conf" / "scale").glob("*.yaml"))


def small_target(directory: Path) -> Path:
    """A random model of 4 layers on disk, as `target.path` takes it."""
    tokenizer = train_tokenizer(["def f(x): return x + 1\n"] * 8, vocab_size=264, n_ctx=64)
    sizes = LlamaSimpleMLPConfig(
        n_layers=4, d_model=16, d_mlp=64, n_heads=2, n_kv_heads=2, n_ctx=64, n_vocab=len(tokenizer)
    )
    save(LlamaSimpleMLP(sizes, torch.Generator().manual_seed(0)), tokenizer, directory)
    return directory


@dataclass(frozen=True)
class Finished:
    status: int
    out: str
    err: str


def start(script: Path, *arguments: str, cwd: Path = REPO, **environment: str) -> Finished:
    """A program in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def script(directory: Path, body: str, name: str = "exp_000_quickstart") -> Path:
    """A program that binds conf/<name>.yaml to a main of one's own, whose lines are `body`."""
    path = directory / "run.py"
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(f'''
from pathlib import Path
from nndecomp.config.schema import RunConfig
from nndecomp.run import experiment

@experiment("{name}")
def main(cfg: RunConfig, out: Path) -> dict[str, float]:
{indented}

if __name__ == "__main__":
    main()
''')
    return path


def contents(out: Path) -> dict[str, Any]:
    """Every number that training left, without what depends on the machine's speed, and without the state of Python's own
    generator, from which training draws nothing, but libraries do as they are imported."""
    (path,) = out.glob("checkpoint/*/state.pt")
    state = torch.load(path, weights_only=True)
    state["random"].pop("python")
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": sorted(str(file.relative_to(out)) for file in out.rglob("*")),
        "state": plain(state),
        "weights": [file.read_bytes() for file in sorted(out.rglob("*.safetensors"))],
        "log": [{key: value for key, value in row.items() if key != "timing"} for row in log],
    }


def plain(tree: Any) -> Any:
    match tree:
        case dict():
            return {key: plain(value) for key, value in tree.items()}
        case list() | tuple():
            return [plain(value) for value in tree]
        case Tensor():
            return str(tree.dtype), tree.tolist()
        case _:
            return tree
