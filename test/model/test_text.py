"""Tests that an instruction gives the token ids that the network was trained on."""

import pytest
import torch
from small_model import WORDS, small_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.checkpoint import EMBEDDED, TOKENIZER
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.text import END_OF_CHUNK, END_OF_TEXT, IMAGE, PAD, InstructionTokenizer, prompt

SPECIALS = (IMAGE, END_OF_CHUNK, END_OF_TEXT, PAD)
EOS, END, IMG, PADDING, PUSH, LIFT, THE, RED = range(8)


def test_an_instruction_is_stripped_and_wrapped():
    assert prompt("  push the block \n") == "<image>push the block<|endofchunk|><|endoftext|>"


def test_token_ids_follow_the_template():
    ids, mask = small_tokenizer().encode([" push the red "])
    assert ids.tolist() == [[IMG, PUSH, THE, RED, END, EOS]]
    assert mask.tolist() == [[1] * 6]
    assert ids.dtype == mask.dtype == torch.int64


def test_a_batch_is_padded_on_the_right_to_its_longest():
    ids, mask = small_tokenizer().encode(["lift", "push the red"])
    assert ids.tolist() == [[IMG, LIFT, END, EOS, PADDING, PADDING], [IMG, PUSH, THE, RED, END, EOS]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]


def test_an_overlong_instruction_is_cut_and_loses_its_closing_specials():
    ids, mask = small_tokenizer(max_tokens=5).encode(["push the red the red the red"])
    assert ids.tolist() == [[IMG, PUSH, THE, RED, THE]]
    assert mask.sum() == 5


@pytest.mark.parametrize("special", SPECIALS)
def test_a_special_token_spelled_in_an_instruction_is_dropped(special):
    tokenizer = small_tokenizer()
    ids, _ = tokenizer.encode([f"push {special} the{special}red"])
    assert ids.tolist() == tokenizer.encode(["push the red"])[0].tolist()


def test_dropping_one_special_does_not_spell_another():
    ids, _ = small_tokenizer().encode(["push <im<PAD>age> <|endof<image>chunk|>"])
    assert ids[0].tolist().count(IMG) == 1 and ids[0].tolist().count(END) == 1


def test_an_empty_instruction_is_its_specials():
    assert small_tokenizer().encode([""])[0].tolist() == [[IMG, END, EOS]]


def test_a_tokenizer_survives_its_file(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.save(tmp_path / TOKENIZER)
    again = InstructionTokenizer.from_file(tmp_path / TOKENIZER, tokenizer.max_tokens)
    texts = ["push the red block to the left", "lift", " ".join(WORDS * 3)]
    for before, after in zip(tokenizer.encode(texts), again.encode(texts)):
        assert torch.equal(before, after)
    assert (again.image_token, again.size) == (tokenizer.image_token, tokenizer.size)


def test_a_tokenizer_without_the_special_tokens_is_refused_by_their_names():
    with pytest.raises(UserError, match=r"\['<image>', '<\|endofchunk\|>', '<PAD>'\] are missing"):
        InstructionTokenizer(Tokenizer(WordLevel({END_OF_TEXT: 0, "push": 1}, unk_token=END_OF_TEXT)), 8)


def test_the_embedded_tokenizer_takes_any_text():
    config = tabletop()
    tokenizer = InstructionTokenizer.from_file(EMBEDDED / TOKENIZER, config.max_tokens)
    ids, _ = tokenizer.encode(["lift the red block", "hebe den roten Würfel auf, 红色 🙂"])
    assert ids.max() < config.decoder.vocabulary
    assert ids[0, 0] == ids[1, 0] == tokenizer.image_token
