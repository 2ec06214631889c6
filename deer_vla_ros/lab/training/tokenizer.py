"""Training of a small network's tokenizer on its instructions."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer


def train_tokenizer(instructions: Iterable[str], config: ModelConfig) -> InstructionTokenizer:
    """Trains a byte-level BPE tokenizer; the result is deterministic.

    It keeps the words of the instructions whole. It also encodes any other text, with more tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, special=True) for token in (END_OF_TEXT, END_OF_CHUNK, IMAGE, PAD)]
    trainer = trainers.BpeTrainer(
        vocab_size=config.decoder.vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(instructions, trainer)
    return InstructionTokenizer(tokenizer, config.max_tokens)
