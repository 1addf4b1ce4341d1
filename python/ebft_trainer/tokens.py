"""What model and tokenizer agree on before anything is computed: which token ids there are, and which end a rollout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ebft_kernels.integrations.transformers import output_head

from .config import EBFTOptions, options_of
from .rollout import end_tokens


def agreed_options(model: nn.Module, tokenizer: Any, options: EBFTOptions) -> EBFTOptions:
    """The method's options with ``vocabulary`` and ``eos_token_ids`` as they hold for the whole run.

    Where they are not given, the ids are those up to the tokenizer's last token, and a rollout ends with the
    tokenizer's end of text or the model's. transformers makes the model's configs agree with the tokenizer when
    training begins: asked then, the model would say something else than in an evaluation before.

    Args:
        model: a transformers causal language model, wrapped or not.
        tokenizer: the tokenizer or processor; None: only the model is asked.
        options: as they were given.

    Raises:
        ValueError: ids that the model's embedding or head has no row for; the message says how many rows there are.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    _check_padding(getattr(tokenizer, "pad_token_id", None), rows)
    vocabulary = _vocabulary(output_head(model).weight.shape[0], tokenizer, options)
    ends = list(end_tokens(model, options.eos_token_ids))
    own = getattr(tokenizer, "eos_token_id", None)
    if options.eos_token_ids is None and own is not None:
        ends = [own, *(token for token in ends if token != own)]
    known = rows if vocabulary is None else min(rows, vocabulary)
    if max(ends, default=0) >= known:
        raise ValueError(f"eos_token_ids: expected token ids below {known}, which can be sampled, got {ends}")
    return replace(options_of(options), vocabulary=vocabulary, eos_token_ids=ends)


def _check_padding(pad: int | None, rows: int) -> None:
    # It would be saved as the model's own padding token too, and the model could not be loaded again.
    if pad is not None and not 0 <= pad < rows:
        raise ValueError(
            f"processing_class: expected a padding token below {rows}, the rows of the model's embedding, got {pad}; "
            f"set tokenizer.pad_token = tokenizer.eos_token or call model.resize_token_embeddings({pad + 1})"
        )


def _vocabulary(rows: int, tokenizer: Any, options: EBFTOptions) -> int | None:
    """How many token ids there are, where that is not all ``rows`` of the head."""
    if options.vocabulary is not None:
        if options.vocabulary > rows:
            raise ValueError(f"vocabulary: expected at most {rows}, the rows of the head, got {options.vocabulary}")
        return options.vocabulary
    if not hasattr(tokenizer, "get_vocab"):
        return None
    # Not their number: ids may be left out in the middle.
    tokens = 1 + max(tokenizer.get_vocab().values(), default=rows - 1)
    return None if tokens >= rows else tokens


def masked_token_ids(model: nn.Module, options: EBFTOptions) -> int:
    """How many rows of the head `agreed_options` leave out."""
    rows = output_head(model).weight.shape[0]
    return 0 if options.vocabulary is None else rows - options.vocabulary
