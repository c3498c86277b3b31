"""Text -> packed token batches: the standard library, local files, Hub data sets."""

from nndecomp.tokens.batch import TokenBatch
from nndecomp.tokens.stream import TokenStream, heldout_tokens, open_tokens, training_documents

__all__ = ["TokenBatch", "TokenStream", "heldout_tokens", "open_tokens", "training_documents"]
