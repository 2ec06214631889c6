"""Where does a small network's tokenizer come from? From the instructions it is trained on."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from deer_vla_ros.model.config import ModelConfig
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer


def train_tokenizer(instructions: Iterable[str], config: ModelConfig) -> InstructionTokenizer:
    """A byte-level BPE that keeps the instructions' words whole, and takes any other text too, in more tokens; deterministic."""
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
