"""The prompt template for instructions, and its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_file
from deer_vla_ros.model.tokenizer_file import read_tokenizer_file

IMAGE, END_OF_CHUNK, END_OF_TEXT, PAD = "<image>", "<|endofchunk|>", "<|endoftext|>", "<PAD>"


def prompt(instruction: str) -> str:
    """`<image>{instruction, stripped}<|endofchunk|><|endoftext|>`.

    Special tokens that the instruction contains as text are removed.
    """
    for special in (IMAGE, END_OF_CHUNK, END_OF_TEXT, PAD):
        instruction = instruction.replace(special, " ")
    return f"{IMAGE}{instruction.strip()}{END_OF_CHUNK}{END_OF_TEXT}"


class InstructionTokenizer:
    """Makes token ids from instructions. It cuts each to `max_tokens`, so a long instruction loses its two
    last special tokens."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        missing = [
            token for token in (IMAGE, END_OF_CHUNK, END_OF_TEXT, PAD) if tokenizer.token_to_id(token) is None
        ]
        if missing:
            raise UserError(
                f"tokenizer: special tokens {missing} are missing: add them before saving tokenizer.json"
            )
        tokenizer.enable_truncation(max_tokens)
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.image_token = tokenizer.token_to_id(IMAGE)
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @classmethod
    def from_file(cls, path: Path, max_tokens: int) -> InstructionTokenizer:
        """Reads a `tokenizer.json`. Raises UserError if this fails."""
        return cls(read_tokenizer_file(path, "restore the file from the checkpoint"), max_tokens)

    def encode(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (1 = real token), both (B, S) int64.

        Texts are padded on the right to the longest of the batch.
        """
        prompts = [prompt(text) for text in instructions]
        found = self._tokenizer.encode_batch(prompts, add_special_tokens=False)
        ids, mask = [each.ids for each in found], [each.attention_mask for each in found]
        return torch.tensor(ids), torch.tensor(mask)

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`."""
        with whole_file(path) as scratch:
            self._tokenizer.save(str(scratch))
