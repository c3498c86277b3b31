"""For notebooks: a target, its activations, decompositions of it, and what they cost, in a few lines.

target = nndecomp.load_target("tiny")
clt = nndecomp.load_decomposition("output/exp_000_quickstart/<time>", "cross_layer_transcoder_k16")
x = nndecomp.read(target, clt, "def area(r):")       # [token, d_reads]
codes = clt.encode(x)
y_hat = clt.decode(codes, x)                         # [token, d_writes]
logits = nndecomp.patched_logits(target, clt, "def area(r):", layers=[2])
rows = nndecomp.evaluate(target, clt, "tokens=stdlib", "evaluation.n_seqs=32")

Into another form: `to_jumprelu(clt, x)` (batchtopk by its threshold, topk by one that keeps as many features of the rows x),
`to_pursuit(sae, k=8)` (codes found by gradient pursuit), `with_unit_norm_decoder(clt)`; each is saved as any other.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from nndecomp import build
from nndecomp.activations.sequences import RowsOrSequences, beside
from nndecomp.config.compose import compose
from nndecomp.config.registry import CONF
from nndecomp.config.schema import (
    DType,
    Inputs,
    Packing,
    Ranking,
    TargetConfig,
    TargetKind,
    TokensConfig,
    TokensKind,
    require,
)
from nndecomp.decompositions.attribution import AttributedNeurons
from nndecomp.decompositions.base import Decomposition, Replacement
from nndecomp.decompositions.conversion import to_jumprelu, to_pursuit, with_unit_norm_decoder
from nndecomp.decompositions.groups import SparseDictionary
from nndecomp.decompositions.neurons import NeuronBaseline
from nndecomp.decompositions.replacing import pasted
from nndecomp.decompositions.spd.gated import GatedParameters
from nndecomp.decompositions.spd.gates import Gate, GateKind
from nndecomp.decompositions.spd.pretrained import load_parameters as saved
from nndecomp.evaluation.answers import answers
from nndecomp.evaluation.patching import Batch, clean_run
from nndecomp.targets import load
from nndecomp.targets.base import Target
from nndecomp.tokens import TokenBatch
from nndecomp.tokens.encoding import Encoding
from nndecomp.types import Site

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = [
    "evaluate",
    "load_decomposition",
    "load_parameters",
    "load_target",
    "neurons",
    "patched_logits",
    "read",
    "record",
    "rows",
    "to_jumprelu",
    "to_pursuit",
    "tokenise",
    "with_unit_norm_decoder",
]

Text = str | Sequence[str]


def load_target(name: str, device: str = "cpu", dtype: str | None = None, revision: str | None = None) -> Target:
    """A file of conf/target by its name, a directory, a Hugging Face id, or wandb:<entity>/<project>/<run>.

    `dtype` (float32, bfloat16, float16) and `revision` (of a Hugging Face id) replace the file's, if given.
    """
    path, known = Path(name).expanduser(), sorted(file.stem for file in (CONF / "target").glob("*.yaml"))
    if name in known:
        cfg = compose("config", [f"target={name}", "name=notebook"]).target
    elif name.startswith("wandb:") or (path / "model_config.yaml").is_file():
        cfg = TargetConfig(kind=TargetKind.llama_simple_mlp, path=name)
    else:
        close = [] if "/" in name or path.is_dir() else get_close_matches(name, known)
        require(not close, f"target {name} is neither a file of conf/target nor a directory; is it {', '.join(close)}?")
        cfg = TargetConfig(kind=TargetKind.huggingface, path=name)
    if dtype is not None:
        require(dtype in DType.__members__, f"dtype={dtype} is not one of {', '.join(DType.__members__)}")
        cfg.dtype = DType[dtype]
    cfg.revision = cfg.revision if revision is None else revision
    return load.load_target(cfg, torch.device(device))


def load_decomposition(source: str | Path, name: str | None = None, device: str = "cpu") -> SparseDictionary:
    """Of a run directory (`name` says which, if it holds several), a saved directory, or the Hugging Face Hub."""
    saved = Path(source).expanduser() / "decompositions"
    if not saved.is_dir():
        require(name is None, f"{source} is not a run directory: it has no decompositions/{name}")
        return SparseDictionary.from_pretrained(source, device)
    names = sorted(path.parent.name for path in saved.glob("*/config.json"))  # not those that are still being written
    require(bool(names), f"{source} has no decomposition yet: nothing in {saved} is whole")
    require(name is not None or len(names) == 1, f"{source} has several decompositions; name one of {', '.join(names)}")
    name = names[0] if name is None else name
    require(name in names, f"{source} has no decomposition {name}; there are: {', '.join(names)}")
    return SparseDictionary.from_pretrained(saved / name, device)


def load_parameters(
    source: str | Path, target: Target, gate: str = "importance", delta: bool = False
) -> GatedParameters:
    """The parameter decomposition of a run directory, or a saved directory, as it takes the place of weights of `target`.

    gate: `importance` (masks are the importances), `threshold0.5` (components with an importance above it), `topk16` (the 16
    largest of each map), `topk_all64` (the 64 largest of all maps); delta: with what the components leave of the weights.
    """
    found = re.fullmatch(r"(importance|threshold|topk|topk_all)([\d.]*)", gate)
    wanted = "importance, threshold<0..1>, topk<k> or topk_all<k>"
    require(found is not None and (found[1] == "importance") == (not found[2]), f"gate={gate} is none of {wanted}")
    assert found is not None
    kind = GateKind[found[1]]
    value = None if not found[2] else float(found[2]) if kind is GateKind.threshold else int(found[2])
    run = Path(source).expanduser()
    decomposition = (
        build.saved_parameters(run, target) if (run / "decompositions").is_dir() else saved(source, target.module())
    )
    return GatedParameters(decomposition, target, Gate(kind, value, delta))


def neurons(target: Target, k: int, ranking: str = "activation") -> NeuronBaseline:
    """The baseline: of every MLP's neurons, each token keeps the first k by activation, output_norm or attribution.

    `attribution` ranks by the loss of the text that follows: it needs the clean run and its text.
    """
    require(ranking in Ranking.__members__, f"ranking={ranking} is not one of {', '.join(Ranking.__members__)}")
    n_layers, d_mlp = target.shape.of(None).n_layers, target.shape.of(None).d_mlp
    require(0 < k <= d_mlp, f"k={k} is not between 1 and the {d_mlp} neurons of an MLP")
    if ranking == Ranking.attribution.value:
        return AttributedNeurons(target, range(n_layers), [k] * n_layers)
    return NeuronBaseline(target, range(n_layers), [k] * n_layers, Ranking[ranking])


def tokenise(target: Target, text: Text) -> TokenBatch:
    """One row a text, right-padded; begins with BOS where the target's tokenizer does so by itself.

    Raises SettingError for a text that is empty or longer than the target's context.
    """
    texts = [text] if isinstance(text, str) else list(text)
    require(bool(texts), "text=[] holds no text; give one text or several")
    cfg = TokensConfig(kind=TokensKind.stdlib, path=None, packing=Packing.documents, seq_len=max(2, target.shape.n_ctx))
    encoding = Encoding.of(cfg, target.tokenizer)
    ids_of_texts, longest = encoding.ids(texts), target.shape.n_ctx - (encoding.bos is not None)
    for i, ids in enumerate(ids_of_texts):
        require(0 < len(ids) <= longest, f"text {i} has {len(ids)} tokens, but {target.name} takes in 1 to {longest}")
    rows = [encoding.document_row(ids) for ids in ids_of_texts]
    return TokenBatch.of(rows, max(len(row.ids) for row in rows), encoding.pad).to(target.device)


def record(target: Target, text: Text, sites: Sequence[str]) -> dict[str, Float[Tensor, "batch pos _"]]:
    """Activations by the names they were asked for: `L3.mlp_out`, `L0.z.h5`, `embed`, `blocks.3.hook_mlp_out`."""
    require(not isinstance(sites, str), f"sites={sites!r} is not a list; write [{sites!r}]")
    require(len(sites) > 0, "sites=[] names none; write for example ['L0.mlp_in']")
    parsed = {name: Site.parse(name) for name in sites}
    for site in parsed.values():
        target.shape.check(site, "sites")
    recorded = target.record(tokenise(target, text).tokens, list(dict.fromkeys(parsed.values())))
    return {name: recorded[site] for name, site in parsed.items()}


def read(target: Target, decomposition: Decomposition, text: Text) -> RowsOrSequences:
    """What a decomposition reads, as its `encode` and `forward` take it: one row a token, padding and BOS left out.

    Where it attends to earlier positions, whole sequences; what it makes of them is one row a token all the same.
    """
    batch = whole(tokenise(target, text))
    recorded = target.record(batch.tokens, decomposition.reads)
    taken = batch.whole if decomposition.needs_sequences else batch.rows
    return beside([taken(recorded[site]) for site in decomposition.read_layout.sites])


@torch.no_grad()
def patched_logits(
    target: Target,
    decomposition: Replacement,
    text: Text,
    layers: Sequence[int] | None = None,
    inputs: str = "live",
) -> Float[Tensor, "batch pos vocab"]:
    """Next-token logits with the decomposition in place of what it writes, at `layers` (null: all it writes).

    inputs: `live` lets each read see what arrives in the patched run, `clean` what the undisturbed run had; with `clean_gates`
    components of weights see what arrives, and their gates the undisturbed run.
    """
    require(inputs in Inputs.__members__, f"inputs={inputs} is not one of {', '.join(Inputs.__members__)}")
    sites = tuple(site for site in decomposition.writes if layers is None or site.layer in layers)
    require(bool(sites), f"layers={layers} has none of {', '.join(map(str, decomposition.writes))}, which are written")
    batch, mode = whole(tokenise(target, text)), Inputs[inputs]
    inside = answers(target, [decomposition])
    obstacle = inside.obstacle(mode) if inside.offers(mode) else "only gates of parameters can be had apart"
    require(obstacle is None, f"inputs={inputs} is not possible: {obstacle}; use inputs=clean")
    if mode is Inputs.clean:
        attends = isinstance(decomposition, Decomposition) and decomposition.needs_sequences
        rows, _ = inside.clean(
            batch, clean_run(target, batch, decomposition.reads, decomposition.reads if attends else ())
        )
        replaced = target.patch(pasted(batch, {site: rows[site] for site in sites}))
    else:
        replaced = inside.inside(mode, batch, sites)
    with replaced:
        return target.logits(batch.tokens)


def evaluate(target: Target, decompositions: Replacement | Mapping[str, Replacement], *overrides: str) -> "DataFrame":
    """Rows of measurements on held-out text, as every run writes them; `overrides` are settings of conf/config.yaml.

    nndecomp.evaluate(target, {"clt": clt, "neurons": nndecomp.neurons(target, 16)}, "tokens=stdlib", "tokens.seq_len=128")
    """
    named = decompositions if isinstance(decompositions, Mapping) else {"decomposition": decompositions}
    require(bool(named), "decompositions={} has nothing to measure; give one, or several by name")
    cfg = compose("config", ["name=notebook", *overrides])
    build.check_length(cfg, target.shape)
    return build.measured(cfg, target, {name: [each] for name, each in named.items()}, run="notebook")


def rows(*runs: str | Path) -> "DataFrame":
    """The measurements of finished runs, or of all finished runs below the directories given."""
    from nndecomp.report.collect import collect  # late: loads pandas

    return collect([Path(run) for run in runs])


def whole(batch: TokenBatch) -> Batch:
    """A batch whose positions all count, but for padding and BOS."""
    kept = (batch.mask & ~batch.is_bos).flatten().nonzero()[:, 0]
    return Batch(batch.tokens, kept, slice(0, len(batch)), batch.mask[:, 1:] & batch.mask[:, :-1])
