"""A tokenizer of one's own: byte-level BPE, so that every text has tokens and every token sequence is text."""

from collections.abc import Iterable
from typing import Any

END = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int, n_ctx: int) -> Any:
    """A fast transformers tokenizer with `vocab_size` tokens, END among them as EOS; it puts no BOS in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    assert bpe.get_vocab_size() == vocab_size, (
        f"the text gave {bpe.get_vocab_size()} tokens, not pretrain.vocab_size={vocab_size}; it is too short"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, model_max_length=n_ctx, clean_up_tokenization_spaces=False
    )
