"""Documents -> token ids -> rows."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nndecomp.config.schema import Packing, TokensConfig, require
from nndecomp.tokens.batch import Row
from nndecomp.tokens.documents import Body


@dataclass(frozen=True)
class Encoding:
    """How documents become rows: everything that the tokenizer and the settings decide, decided once."""

    tokenizer: Any
    bos: int | None  # None: rows start with text
    eos: int | None  # after each document; None where documents are not joined
    pad: int  # never read: masked
    cfg: TokensConfig

    @staticmethod
    def of(cfg: TokensConfig, tokenizer: Any) -> "Encoding":
        prepend = prepends_bos(tokenizer) if cfg.prepend_bos is None else cfg.prepend_bos
        joined = cfg.packing is Packing.packed and cfg.tokens_column is None
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if cfg.tokens_column is None:
            require(
                not prepend or bos is not None,
                f"tokens.prepend_bos={cfg.prepend_bos} needs a BOS token, which {tokenizer.name_or_path!r} does not have",
            )
        else:
            require(
                cfg.prepend_bos is None and not cfg.lowercase,
                f"tokens.prepend_bos={cfg.prepend_bos} and tokens.lowercase={cfg.lowercase} cannot change rows that are "
                f"tokens already (tokens.tokens_column={cfg.tokens_column}); leave them null and false",
            )
        require(
            not joined or eos is not None,
            f"tokens.packing=packed joins documents by EOS, which {tokenizer.name_or_path!r} does not have; "
            "use tokens.packing=documents",
        )
        pad = next((token for token in (tokenizer.pad_token_id, eos, bos) if token is not None), 0)
        return Encoding(tokenizer, bos if prepend else None, eos if joined else None, pad, cfg)

    @property
    def joined(self) -> bool:
        """Whether documents run on in rows that are always full."""
        return self.eos is not None

    def ids(self, documents: Sequence[Body]) -> list[list[int]]:
        """Token ids of each document, followed by EOS where documents are joined; no BOS."""
        texts = [text.lower() if self.cfg.lowercase else text for text in documents if isinstance(text, str)]
        tokenised = [ids for ids in documents if isinstance(ids, list)]
        assert not (texts and tokenised), f"{len(texts)} texts among {len(tokenised)} rows of tokens"
        if tokenised:
            self._check_vocabulary(max(map(max, tokenised)))
            return tokenised
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        end = [] if self.eos is None else [self.eos]
        return [ids + end for ids in encoded["input_ids"]]

    def _check_vocabulary(self, largest: int) -> None:
        n_vocab = len(self.tokenizer)
        require(
            largest < n_vocab,
            f"tokens.tokens_column={self.cfg.tokens_column} holds token {largest}, but the target's tokenizer has "
            f"{n_vocab} tokens; these rows were made by another tokenizer",
        )

    def document_row(self, ids: list[int]) -> Row:
        """A document on a row of its own: its first tokens."""
        if self.cfg.tokens_column is not None:
            return Row(ids[: self.cfg.seq_len], bos=ids[0] == self.tokenizer.bos_token_id)
        if self.bos is None:
            return Row(ids[: self.cfg.seq_len], bos=False)
        return Row([self.bos, *ids[: self.cfg.seq_len - 1]], bos=True)

    def packed_row(self, lane: deque[int], documents: Iterator[list[int]]) -> Row | None:
        """A full row off the left end of `lane`, which takes on documents as it needs them; None if they run out."""
        width = self.cfg.seq_len - (self.bos is not None)
        while len(lane) < width:
            ids = next(documents, None)
            if ids is None:
                return None
            lane.extend(ids)
        ids = [lane.popleft() for _ in range(width)]
        return Row(ids, bos=False) if self.bos is None else Row([self.bos, *ids], bos=True)

    def rows(self, documents: Iterable[Body]) -> Iterator[Row]:
        """All rows of finitely many documents, in order; an incomplete last row is left out."""
        encoded = (self.ids([document])[0] for document in documents)
        if not self.joined:
            yield from map(self.document_row, encoded)
            return
        lane: deque[int] = deque()
        while (row := self.packed_row(lane, encoded)) is not None:
            yield row


def prepends_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS in front by itself: seen by encoding, not by a flag that may lie."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == tokenizer.bos_token_id
