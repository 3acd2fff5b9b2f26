import pytest

from unisparse_flex.evaluation.needle import build_prompt, draw_needle
from unisparse_flex.evaluation.texts import TEXT_NAMES, draw_excerpt, load_text


@pytest.mark.parametrize("text", TEXT_NAMES)
@pytest.mark.parametrize("tokens", [512, 1000, 8192])
def test_prompt_has_exactly_the_tokens_asked_for(tokenizer, text, tokens):
    prompt = build_prompt(tokenizer, text=text, tokens=tokens, depth=0.35, seed=0)
    assert prompt.input_ids.shape == (1, tokens)
    assert prompt.tokens == tokens


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.35, 0.99, 1.0])
def test_needle_lies_at_its_depth(tokenizer, depth):
    prompt = build_prompt(tokenizer, text="prose", tokens=2048, depth=depth, seed=1)
    start, stop = prompt.needle_span
    ids = prompt.input_ids[0].tolist()
    assert tokenizer.decode(ids[start:stop]).strip() == prompt.needle.sentence
    length = prompt.question_start - (stop - start)
    assert abs(start - depth * length) <= 64
    if depth in (0.0, 1.0):
        assert start == depth * length


def test_needle_is_stated_once_and_asked_for_at_the_end(tokenizer):
    prompt = build_prompt(tokenizer, text="prose", tokens=1024, depth=0.5, seed=2)
    text = tokenizer.decode(prompt.input_ids[0].tolist())
    assert text.count(prompt.needle.value) == 1
    assert text.endswith(prompt.needle.question)
    question = tokenizer.decode(prompt.input_ids[0, prompt.question_start :].tolist())
    assert question.strip() == prompt.needle.question


def test_prompt_depends_on_its_seed_alone(tokenizer):
    def ids(seed):
        prompt = build_prompt(tokenizer, text="code", tokens=512, depth=0.5, seed=seed)
        return prompt.input_ids.tolist()

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_needle_is_two_words_and_seven_digits():
    needle = draw_needle(seed=7)
    adjective, noun = needle.key.split("-")
    assert adjective.isalpha()
    assert noun.isalpha()
    assert len(needle.value) == 7
    assert needle.is_in(f" {needle.value}.")
    assert not needle.is_in(f" {needle.value[:-1]}.")


def test_prompt_too_short_for_its_question_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ for this needle, got 20"):
        build_prompt(tokenizer, text="prose", tokens=20, depth=0.5, seed=0)


def test_depth_outside_the_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"depth must be in \[0, 1\], got 1.5"):
        build_prompt(tokenizer, text="prose", tokens=512, depth=1.5, seed=0)


def test_king_james_is_text_without_markup():
    text = load_text("prose")
    assert text.startswith("In the beginning God created the heaven and the earth.")
    assert not {"[", "]"} & set(text)
    assert len(text) > 4_000_000


def test_excerpt_begins_a_line_and_has_its_length():
    text = "".join(f"line {i}\n" for i in range(1000))
    excerpt = draw_excerpt(text, characters=100, seed=3)
    assert excerpt.startswith("line ")
    assert len(excerpt) == 100
    with pytest.raises(ValueError, match="characters must be at most the length of the text"):
        draw_excerpt(text, characters=len(text) + 1, seed=3)
