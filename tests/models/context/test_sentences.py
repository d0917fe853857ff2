"""Sentences as token ids and as states: what is cut, what is counted, what is refused."""

import dataclasses
import json
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.text_folders import VOCABULARY, write_tokenizer
from vpd_jax.convert.tokenizer import Tokenize
from vpd_jax.models import parameters
from vpd_jax.models.backbones.clip_text import TextSizes
from vpd_jax.models.backbones.layers import Identity
from vpd_jax.models.context import sentences
from vpd_jax.models.initializers import InitKeys

SIZES = TextSizes(vocab_size=100, width=16, layers=1, heads=2, mlp_width=32, positions=12)
KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def tokens_of(length):
  return sentences.SentenceTokens(Tokenize(("characters",), 100, length + 1), length)


def test_a_sentence_that_fits_is_that_of_the_tokenizer():
  tokens, cut = tokens_of(8).rows(("ab", "abcdef"))
  np.testing.assert_array_equal(tokens, Tokenize(("characters",), 100, 8)(("ab", "abcdef")))
  assert tokens.dtype == np.int32 and not cut.any()


def test_a_longer_sentence_keeps_its_first_tokens_and_ends():
  tokens, cut = tokens_of(8).rows(("abcdefg", "abcdef"))
  np.testing.assert_array_equal(tokens[0], tokens[1])
  assert cut.tolist() == [True, False] and tokens[0, -1] == 99


def test_words_have_one_id_each_whatever_punctuation_follows():
  made = Tokenize(("words",), 100, 12)(("a red box, a T-shirt and Anna's bed.", "a red box a t-shirt and anna's bed"))
  np.testing.assert_array_equal(made[0], made[1])
  assert np.argmax(made[0]) == 9  # the end, behind eight words


@pytest.mark.parametrize("padding", ["!", "<|endoftext|>"])
def test_padding_is_that_of_the_tokenizer(tmp_path, padding):
  """Stable Diffusion 2.x pads with "!", id 0, in place of the end."""
  folder = tmp_path / "tokenizer"
  vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["!", *VOCABULARY]))}
  write_tokenizer(folder, vocabulary)
  settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": padding}
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  end, begin = vocabulary["<|endoftext|>"], vocabulary["<|startoftext|>"]
  whole = Tokenize((str(folder),), len(vocabulary), 77)(("a bed",))[0].tolist()
  length = whole.index(end) + 1  # that of the sentence
  how = lambda length: sentences.SentenceTokens(Tokenize((str(folder),), len(vocabulary), length + 1), length)
  for more in (0, 1, 5):
    tokens, cut = how(length + more).rows(("a bed",))
    assert tokens[0].tolist() == whole[:length] + [vocabulary[padding]] * more and not cut.any()
  tokens, cut = how(length - 1).rows(("a bed", "a"))
  assert tokens[0].tolist() == [*whole[: length - 2], end] and cut.tolist() == [True, False]
  assert how(length - 1).summary(["a bed " * 9]).startswith("1 sentences, 1 of them truncated")
  assert how(length).summary(["a bed"]).startswith("1 sentences, 0 of them truncated") and tokens[0, 0] == begin


def test_the_side_of_padding_in_a_tokenizers_files_does_not_count(tmp_path):
  read = {}
  for side in ("right", "left"):
    folder = tmp_path / side
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": side}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": side}))
    read[side] = [Tokenize((str(folder),), len(VOCABULARY), length)(("a bed",)).tolist() for length in (4, 12)]
  assert read["left"] == read["right"]


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|startoftext|>"])
def test_a_sentence_that_spells_a_mark_of_the_tokenizer_is_refused(tmp_path, mark):
  write_tokenizer(tmp_path / "tokenizer")
  with pytest.raises(ValueError, match=r"^a sentence holds '<\|.*\|>', which the tokenizer treats as a special token"):
    Tokenize((str(tmp_path / "tokenizer"),), len(VOCABULARY), 77)((f"a {mark} bed",))


def test_the_census_counts_what_is_cut_and_names_it():
  how = tokens_of(8)
  texts = ["ab", "abcdefg", "abcdef", "abcdefgh"]
  line = how.summary(texts)
  assert line.startswith("4 sentences, 2 of them truncated to 8 tokens") and "'abcdefg', 'abcdefgh'" in line
  assert how.summary(["ab"]) == "1 sentences, 0 of them truncated to 8 tokens (method.token_length)"


def test_only_what_may_be_too_long_is_tokenized():
  asked = []

  def spy(texts):
    asked.extend(texts)
    return Tokenize(("characters",), 100, 9)(texts)

  sentences.SentenceTokens(spy, 8).summary(["abcdef", "abcdefg", "é"])
  assert asked == ["abcdefg", "é"]


def test_an_example_gets_its_tokens_and_the_transform_travels():
  how = pickle.loads(pickle.dumps(tokens_of(8)))
  example = {"sentence": "ab", "image": np.zeros((2, 2, 3), np.uint8)}
  found = how(example)
  np.testing.assert_array_equal(found["tokens"], how.rows(("ab",))[0][0])
  assert found.keys() == {"sentence", "image", "tokens"} and "tokens" not in example


def test_ready_states_go_before_tokens():
  make = lambda **kinds: sentences.Sentence(SIZES, 8, 16, tokens_of(8).tokenize, Identity(), **kinds, rngs=InitKeys(0))
  parts = parameters.describe(lambda: make(**KINDS))
  assert not parts.params and parts.buffers  # never trained, whatever the config says
  context = parts.merge(tiny.filled(parts.shapes))
  tokens = jnp.asarray(tokens_of(8).rows(("ab", "cd"))[0])
  encoded = context({"tokens": tokens})
  assert encoded.shape == (2, 8, 16)
  np.testing.assert_array_equal(encoded, context.text_encoder(tokens).last)
  narrow = parameters.describe(lambda: make(**(KINDS | {"dtype": jnp.bfloat16}))).model
  ready = narrow({"text_states": encoded, "tokens": tokens})
  np.testing.assert_array_equal(ready, encoded.astype(jnp.bfloat16))


@pytest.mark.reference
def test_tokens_are_transformers(tmp_path):
  """A small vocabulary in CLIP's form: cut and padded as the release calls CLIPTokenizer."""
  from transformers import CLIPTokenizer

  letters = "abcdefgh"
  words = [*letters, *(f"{x}</w>" for x in letters), "ab", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
  (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na b</w>\n")
  theirs = CLIPTokenizer.from_pretrained(str(tmp_path))
  texts = ("ab cd", "h", "ab ab ab ab ab ab ab", "a b c d e f", "a b c d e f g")
  expected = theirs(list(texts), truncation=True, max_length=8, padding="max_length")["input_ids"]
  how = sentences.SentenceTokens(Tokenize((str(tmp_path),), len(words), 9), 8)
  tokens, cut = how.rows(texts)
  np.testing.assert_array_equal(tokens, expected)
  assert cut.tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("call, message", [
  (lambda: tokens_of(8).rows((" ",)), r"^the sentence is empty; say in words what is to be found"),
  (lambda: tokens_of(8).rows(("ab", "", "\n")), r"^2 of 3 sentences are empty"),
  (lambda: tokens_of(8)({"image": 0}), r"^the method needs a sentence for every image"),
  (lambda: tokens_of(2), r"^method\.token_length=2 must be at least 3"),
  (lambda: sentences.Sentence(SIZES, 13, 16, None, None, **KINDS, rngs=None), r"length=13 is beyond the 12 positions"),
  (lambda: sentences.Sentence(SIZES, 8, 64, None, None, **KINDS, rngs=None), r"is 16 wide, the UNet's context 64\.$"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_a_tokenizer_is_asked_for_only_when_needed():
  how = dataclasses.replace(tokens_of(8), tokenize=Tokenize(("/nowhere",), 100, 9))
  with pytest.raises(ValueError, match="there is no tokenizer in"):
    how({"sentence": "ab"})
