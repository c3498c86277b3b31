"""What a store of activations says about itself: `manifest.json`, and the head of each shard.

A shard is a safetensors file of three tensors: `mean` and `m2` [width] in float64, over the shard's rows, and `rows`
[token, width]. Its header is padded so that `rows` starts at a multiple of 4096 bytes and can be mapped into memory as
it lies. All shards but the last hold `shard_rows` rows.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from nndecomp.config.schema import ActivationsConfig, TargetConfig, TokensConfig, require
from nndecomp.errors import SettingError
from nndecomp.types import Layout, Site

MANIFEST = "manifest.json"
FORMAT = "nndecomp activation store 1"
BLOCK_ROWS = 256  # rows that are read together; shards hold whole blocks
ALIGNMENT = 4096  # bytes; rows of every shard start at a multiple
_STORED = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}  # safetensors' name, bytes

Settings = dict[str, str | int | float | bool | None]


def row_settings(
    target: TargetConfig,
    paired_target: TargetConfig | None,
    tokens: TokensConfig,
    activations: ActivationsConfig,
    tokenizer: Any,
) -> Settings:
    """The settings that decide what a row is, by the names under which a user sets them, and the vocabulary's digest.

    Not the seed: it decides only in which order the text is read.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    named = {f"target.{key}": value for key, value in asdict(target).items()}
    if paired_target is not None:
        named |= {f"paired_target.{key}": value for key, value in asdict(paired_target).items()}
    named |= {f"tokens.{key}": value for key, value in asdict(tokens).items()}
    named |= {f"activations.{key}": getattr(activations, key) for key in ("dtype", "drop_bos", "drop_first")}
    settings = {key: value for name, each in named.items() for key, value in _plain(name, each)}
    return settings | {"tokenizer": hashlib.blake2b(vocabulary, digest_size=16).hexdigest()}


def _plain(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings of settings (`target.planted.plan`) one by one, words in place of enums."""
    match value:
        case dict():
            for key, each in value.items():
                yield from _plain(f"{name}.{key}", each)
        case Enum():
            yield name, value.value
        case _:
            yield name, value


@dataclass(frozen=True)
class Shard:
    file: str
    rows: int
    bytes: int
    crc32: int  # of the rows, then of everything before them


@dataclass(frozen=True)
class Manifest:
    settings: Settings
    target: str  # the model's name
    seed: int  # of the token stream
    batch_seqs: int  # sequences per forward pass
    sites: tuple[str, ...]
    widths: tuple[int, ...]
    n_rows: int  # when complete
    shard_rows: int
    # The first sequence and which of its positions were kept, so that a reader can tell whether its model is the same.
    first_tokens: tuple[int, ...]
    first_kept: tuple[bool, ...]
    shards: tuple[Shard, ...]
    # Where writing goes on: state of the token stream, and how many rows of the batch it gives next are stored already.
    next_tokens: dict[str, Any] | None
    next_skip: int

    @property
    def n_written(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        return self.n_written == self.n_rows

    @property
    def n_shards(self) -> int:
        return -(-self.n_rows // self.shard_rows)

    @cached_property
    def layout(self) -> Layout:
        return Layout(tuple(map(Site.parse, self.sites)), self.widths)

    @property
    def dtype(self) -> str:
        return str(self.settings["activations.dtype"])

    @cached_property
    def identity(self) -> str:
        """Digest of what the rows are: written into every shard, so that none passes for one of another store."""
        what = json.dumps([FORMAT, self.settings, self.seed, self.sites, self.widths, self.shard_rows])
        return hashlib.blake2b(what.encode(), digest_size=16).hexdigest()

    @cached_property
    def row_bytes(self) -> int:
        return self.layout.width * _STORED[self.dtype][1]

    @cached_property
    def rows_offset(self) -> int:
        """Where the rows of a shard start, in bytes from the start of the file."""
        return len(self.header(0, 1)) + 16 * self.layout.width

    def header(self, index: int, n_rows: int) -> bytes:
        """The safetensors header of shard `index`; its length depends on the layout alone."""
        width = self.layout.width
        tensors = {
            "__metadata__": {"store": self.identity, "shard": str(index)},
            "mean": {"dtype": "F64", "shape": [width], "data_offsets": [0, 8 * width]},
            "m2": {"dtype": "F64", "shape": [width], "data_offsets": [8 * width, 16 * width]},
            "rows": {
                "dtype": _STORED[self.dtype][0],
                "shape": [n_rows, width],
                "data_offsets": [16 * width, 16 * width + n_rows * self.row_bytes],
            },
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        # Room for any index and number of rows, up to the next multiple.
        end = -(-(8 + 512 + 16 * width) // ALIGNMENT) * ALIGNMENT
        length = end - 16 * width - 8
        assert len(text) <= length, f"a header of {len(text)} bytes does not fit {length}"
        return length.to_bytes(8, "little") + text.ljust(length)

    def shard_bytes(self, n_rows: int) -> int:
        return self.rows_offset + n_rows * self.row_bytes

    def dumps(self) -> str:
        """JSON, one field a line, the checksum of all other fields among them."""
        fields = {"format": FORMAT} | asdict(self)
        fields |= {"checksum": _checksum(fields)}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
        return f"{{\n{lines}\n}}\n"

    @staticmethod
    def read(directory: Path) -> "Manifest":
        """Raises SettingError if there is none, or none that this version reads whole."""
        named = f"activations.store={directory}"
        require((directory / MANIFEST).is_file(), f"{named} is not a store: there is no {MANIFEST} in it")
        try:
            raw = json.loads((directory / MANIFEST).read_bytes())
        except ValueError as error:
            raise SettingError(f"{named} is damaged: {MANIFEST} is not JSON ({error}); write it again") from error
        require(
            isinstance(raw, dict) and raw.get("format") == FORMAT,
            f"{named} is no store that this version reads: {MANIFEST} does not say {FORMAT!r}",
        )
        checksum = raw.pop("checksum", None)
        require(checksum == _checksum(raw), f"{named} is damaged: {MANIFEST} was changed; write it again")
        del raw["format"]
        fields: dict[str, Any] = raw
        for key in ("sites", "widths", "first_tokens", "first_kept"):
            fields[key] = tuple(fields[key])
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        return Manifest(**fields)


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """A clause that names the first setting in which two runs differ."""
    return next(
        (
            f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
            for key in sorted(there.keys() | here.keys())
            if (key in there, there.get(key)) != (key in here, here.get(key))
        ),
        None,
    )
