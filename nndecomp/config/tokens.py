"""Which text is read, and how it is cut into rows of tokens."""

from dataclasses import dataclass
from enum import Enum

from nndecomp.config.checks import require


class TokensKind(Enum):
    stdlib = "stdlib"  # the Python standard library's own source text
    stdlib_docs = "stdlib_docs"  # its docstrings and the topics of help(): prose
    files = "files"  # local .txt .jsonl .parquet, or a directory or glob of them
    hub = "hub"  # a Hugging Face data set, streamed
    random = "random"  # token ids drawn evenly: for targets whose tokens are not text


class Packing(Enum):
    packed = "packed"  # documents joined by EOS, cut into full rows
    documents = "documents"  # one document per row, cut or padded; padding masked


@dataclass(kw_only=True)
class TokensConfig:
    kind: TokensKind
    path: str | None  # files: path or glob; hub: data set id or a local copy; stdlib, stdlib_docs: null
    subset: str | None = None  # hub: configuration name
    split: str = "train"
    heldout_split: str | None = None  # null: documents are held out by hash, heldout_fraction of them
    heldout_fraction: float = 0.05
    text_column: str = "text"
    tokens_column: str | None = None  # set: rows are already token ids in this column, and text_column is not read
    packing: Packing = Packing.packed
    seq_len: int = 256
    prepend_bos: bool | None = None  # null: as the tokenizer does by itself
    lowercase: bool = False
    # Documents shuffled together as they stream by. Local sources are shuffled whole. 1 keeps the order.
    shuffle_documents: int = 1000

    def __post_init__(self) -> None:
        require(self.seq_len >= 2, f"tokens.seq_len={self.seq_len} leaves nothing to predict; use 2 or more")
        require(
            0 < self.heldout_fraction < 1,
            f"tokens.heldout_fraction={self.heldout_fraction} must lie between 0 and 1",
        )
        require(
            self.shuffle_documents >= 1,
            f"tokens.shuffle_documents={self.shuffle_documents} must be 1 or more",
        )
        require(
            self.kind in (TokensKind.stdlib, TokensKind.stdlib_docs, TokensKind.random) or bool(self.path),
            f"tokens.path is empty; tokens.kind={self.kind.value} needs a path or a data set id",
        )
