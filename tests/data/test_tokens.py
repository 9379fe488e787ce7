"""Exact tokens of every published layout with a plain and a chat tokenizer; the rules of the length limits."""

import copy

import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as decoding
from transformers import PreTrainedTokenizerFast

from dpokit.data import text_cache
from dpokit.data.formats import FORMATS, Pair
from dpokit.data.layouts import match_layout
from dpokit.data.rendering import Renderer
from dpokit.data.shorten import LengthLimits
from dpokit.data.source_rows import find_layout
from dpokit.data.text_cache import TextCache
from dpokit.data.tokens import Encoder
from dpokit.data.transcripts import parse_transcript
from dpokit.errors import DataError, ModelError

QUESTION = "How do I bake bread?"
YES, NO = "Mix flour and wait.", "No, not again."
HH = f"\n\nHuman: {QUESTION}\n\nAssistant:"
USER = {"role": "user", "content": QUESTION}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


NO_LIMITS = LengthLimits()
TURNS = [USER, assistant("What kind?"), {"role": "user", "content": "Rye."}]
HH_TURNS = "\n\nHuman: How do I bake bread?\n\nAssistant: What kind?\n\nHuman: Rye.\n\nAssistant:"
CHAT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
CHAT_TURNS = (
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nWhat kind?<|im_end|>\n"
    "<|im_start|>user\nRye.<|im_end|>\n<|im_start|>assistant\n"
)
SKY = "The sky is"

# layout -> (row, texts of a plain model, texts of a chat model); texts are prompt, chosen, rejected
EXPECTED = {
    "HH prompt": (
        {"prompt": HH, "response": f" {YES}", "chosen": f" {YES}", "rejected": f" {NO}"},
        (HH, f" {YES}", f" {NO}"),
        (CHAT, YES, NO),
    ),
    "explicit, plain": (
        {"prompt": SKY, "chosen": " blue.", "rejected": " green."},
        (HH.replace(QUESTION, SKY), " blue.", " green."),
        (CHAT.replace(QUESTION, SKY), "blue.", "green."),
    ),
    "explicit, conversational": (
        {"prompt": TURNS, "chosen": [assistant(YES)], "rejected": [assistant(NO)]},
        (HH_TURNS, f" {YES}", f" {NO}"),
        (CHAT_TURNS, YES, NO),
    ),
    "dpokit votes": (
        {
            "prompt": TURNS,
            "chosen": [assistant(YES)],
            "rejected": [assistant(NO)],
            "vote": "tuned",
            "answers": {"base": NO, "tuned": YES},
        },
        (HH_TURNS, f" {YES}", f" {NO}"),
        (CHAT_TURNS, YES, NO),
    ),
    "UltraFeedback": (
        {
            "prompt": QUESTION,
            "chosen": [USER, assistant(YES)],
            "rejected": [USER, assistant(NO)],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        (HH, f" {YES}", f" {NO}"),
        (CHAT, YES, NO),
    ),
    "implicit, conversational": (
        {"chosen": [*TURNS, assistant(YES)], "rejected": [*TURNS, assistant(NO)]},
        (HH_TURNS, f" {YES}", f" {NO}"),
        (CHAT_TURNS, YES, NO),
    ),
    "HH transcript": (
        # Both answers begin alike, so their common beginning is longer than the prompt.
        {"chosen": f"{HH_TURNS} No, mix it.", "rejected": f"{HH_TURNS} No, not again."},
        (HH_TURNS, " No, mix it.", " No, not again."),
        (CHAT_TURNS, "No, mix it.", "No, not again."),
    ),
    "implicit, plain": (
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        (HH.replace(QUESTION, SKY), " blue.", " black."),
        (CHAT.replace(QUESTION, SKY), "blue.", "black."),
    ),
}


FLAGS = {layout.name: layout.flag for layout in FORMATS}
IMPLICIT = "implicit_plain"


def encode(
    tokenizer,
    row: dict,
    limits: LengthLimits = NO_LIMITS,
    *,
    form: str | None = None,
    prompt_format: str = "transcript",
) -> dict:
    renderer = Renderer(tokenizer, prompt_format=prompt_format)
    encoder = Encoder(renderer, match_layout([row], "test", form=form), limits)
    columns = encoder({name: [value] for name, value in row.items()}, [0])
    return {name: values[0] for name, values in columns.items()}


def test_the_table_above_has_every_layout():
    assert {layout.name for layout in FORMATS} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_a_row_becomes_exactly_these_tokens(name, kind, plain_tokenizer, chat_tokenizer):
    row, plain, chat = EXPECTED[name]
    tokenizer, expected = (plain_tokenizer, plain) if kind == "plain" else (chat_tokenizer, chat)
    ids = encode(tokenizer, row, form=FLAGS[name])
    assert ids["dropped"] == ""
    for column, text in zip(("prompt_ids", "chosen_ids", "rejected_ids"), expected, strict=True):
        if column != "prompt_ids":
            # One EOS at the end, and no BOS before the answer.
            assert ids[column].count(tokenizer.eos_token_id) == 1
            text += tokenizer.eos_token
        assert tokenizer.decode(ids[column]) == text
        assert ids[column] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids["prompt_ids"] == tokenizer(expected[0])["input_ids"]  # as at inference


def test_an_answer_that_already_ends_with_eos_ends_with_it_once(plain_tokenizer):
    end = plain_tokenizer.eos_token
    ids = encode(plain_tokenizer, {"prompt": SKY, "chosen": f" blue.{end}", "rejected": " green."})
    assert ids["chosen_ids"].count(plain_tokenizer.eos_token_id) == 1


def test_a_cut_answer_has_no_eos_and_a_cut_prompt_keeps_its_end(plain_tokenizer):
    row = EXPECTED["HH prompt"][0]
    whole, short = encode(plain_tokenizer, row), encode(plain_tokenizer, row, LengthLimits(4, 3, None))
    assert short["prompt_ids"] == whole["prompt_ids"][-4:]
    assert short["chosen_ids"] == whole["chosen_ids"][:3]
    assert plain_tokenizer.eos_token_id not in short["chosen_ids"]
    assert short["cut"] == "prompt answer"


def test_only_the_prompt_has_a_bos_and_the_cut_keeps_it(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = None, "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    ids = encode(tokenizer, EXPECTED["HH prompt"][0], LengthLimits(4, None, None))
    assert ids["prompt_ids"][0] == tokenizer.bos_token_id
    assert len(ids["prompt_ids"]) == 4
    assert tokenizer.bos_token_id not in ids["prompt_ids"][1:] + ids["chosen_ids"] + ids["rejected_ids"]


def test_an_eos_of_the_tokenizer_is_removed_from_the_prompt(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert encode(tokenizer, EXPECTED["HH prompt"][0])["prompt_ids"][-1] != tokenizer.eos_token_id


def test_a_space_that_the_tokenizer_adds_is_not_doubled():
    pieces = ["<unk>", "</s>", "▁", *(f"▁{word}" for word in ("The", "sky", "is", "blue.", "green."))]
    backend = Tokenizer(models.Unigram([(piece, 0.0 - i / 10) for i, piece in enumerate([*pieces, "\n"])], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoding.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids = encode(tokenizer, {"prompt": SKY, "chosen": " blue.", "rejected": " green."})
    assert tokenizer.convert_ids_to_tokens(ids["chosen_ids"]) == ["▁blue.", "</s>"]


def test_a_think_block_of_the_template_belongs_to_the_answer(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}",
    )
    renderer = Renderer(tokenizer)
    assert renderer.render(Pair([USER], "Yes.", "No.")).chosen.text == "<think></think>Yes.<|im_end|>"


def test_an_answer_ends_with_the_template_s_end_of_turn(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    assert Renderer(tokenizer).render(Pair([USER], "Yes.", "No.")).chosen.text == "Yes.<|im_end|>"


def test_a_tokenizer_without_eos_is_refused(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        Renderer(tokenizer)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": SKY, "chosen": " ", "rejected": " green."}, "empty_answer"),
        ({"prompt": SKY, "chosen": " green.", "rejected": " green."}, "equal_answers"),
        ({"prompt": "", "chosen": " blue.", "rejected": " green."}, "empty_prompt"),
        ({"chosen": f"{HH} Yes.", "rejected": f"{HH_TURNS} No."}, "different_prompts"),
        ({"chosen": [*TURNS, USER], "rejected": [*TURNS, assistant(NO)]}, "no_answer_turn (user)"),
        ({"chosen": [USER, assistant(YES)], "rejected": [*TURNS[1:], assistant(NO)]}, "different_prompts"),
    ],
)
def test_an_unusable_row_is_dropped_with_its_reason(row, reason, plain_tokenizer):
    assert encode(plain_tokenizer, row)["dropped"] == reason


def test_a_null_among_usable_rows_is_dropped_with_its_reason(plain_tokenizer):
    rows = [{"prompt": SKY, "chosen": " blue.", "rejected": " green."}] * 3
    rows.append({"prompt": SKY, "chosen": None, "rejected": " green."})
    encoder = Encoder(Renderer(plain_tokenizer), match_layout(rows, "test"), LengthLimits())
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    assert encoder(columns, range(4))["dropped"] == ["", "", "", "missing_text (chosen is null)"]


def test_an_unknown_layout_is_reported_with_the_known_ones():
    with pytest.raises(DataError, match='"question": "why"') as error:
        match_layout([{"question": "why", "answer": "because"}], "my.jsonl")
    assert all(layout.name in str(error.value) for layout in FORMATS)


def encode_rows(tokenizer, rows: list[dict], limits: LengthLimits = NO_LIMITS) -> dict[str, list]:
    encoder = Encoder(Renderer(tokenizer), match_layout(rows, "test"), limits)
    return encoder({name: [row[name] for row in rows] for name in rows[0]}, range(len(rows)))


def with_bos(tokenizer, bos: str):
    """Returns a copy without chat template that adds this BOS to every text, as the tokenizers of Llama and OPT do."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.bos_token = None, bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    return tokenizer


def test_a_row_has_these_tokens_at_its_boundaries(plain_tokenizer, chat_tokenizer):
    """An answer begins with its own space, or after the newline of the template."""
    row = EXPECTED["implicit, plain"][0]
    plain, chat = (encode(tokenizer, row, form=IMPLICIT) for tokenizer in (plain_tokenizer, chat_tokenizer))
    names = plain_tokenizer.convert_ids_to_tokens
    assert names(plain["prompt_ids"])[-1] == ":"
    assert names(plain["chosen_ids"])[0].startswith("Ġb")
    assert names(plain["chosen_ids"])[-1] == "<|endoftext|>"
    names = chat_tokenizer.convert_ids_to_tokens
    prompt = names(chat["prompt_ids"])
    assert [name for name in prompt if name.startswith("<|")] == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert prompt[-1] == "Ċ"
    assert names(chat["chosen_ids"])[0].startswith("b")
    assert names(chat["chosen_ids"])[-1] == "<|im_end|>"


@pytest.mark.parametrize("name", EXPECTED)
def test_prompt_and_answer_equal_the_rendered_conversation(name, chat_tokenizer):
    row = EXPECTED[name][0]
    form = FLAGS[name]
    ids, pair = encode(chat_tokenizer, row, form=form), match_layout([row], "test", form=form).to_pair(row)
    turns = pair.prompt if isinstance(pair.prompt, list) else parse_transcript(pair.prompt)
    for column, answer in (("chosen_ids", pair.chosen), ("rejected_ids", pair.rejected)):
        whole = chat_tokenizer.apply_chat_template([*turns, assistant(answer.strip())], tokenize=False)
        assert chat_tokenizer.decode(ids["prompt_ids"] + ids[column]) == whole.removesuffix("\n")


@pytest.mark.parametrize(
    ("name", "prompt_format"), [("HH transcript", "transcript"), ("HH transcript", "raw"), ("implicit, plain", "raw")]
)
def test_prompt_and_answer_of_a_plain_model_are_text_and_eos(name, prompt_format, plain_tokenizer):
    row = EXPECTED[name][0]
    ids = encode(plain_tokenizer, row, form=FLAGS[name], prompt_format=prompt_format)
    for side in ("chosen", "rejected"):
        text = plain_tokenizer.decode(ids["prompt_ids"] + ids[f"{side}_ids"])
        assert text == row[side] + plain_tokenizer.eos_token


def test_a_prompt_does_not_depend_on_the_batch_s_first_row(plain_tokenizer):
    """As with OPT: BOS and EOS are one token, so the empty text of a dropped row is only this token."""
    tokenizer = with_bos(plain_tokenizer, plain_tokenizer.eos_token)
    usable = {"prompt": SKY, "chosen": " blue.", "rejected": " green."}
    dropped = {**usable, "rejected": " blue."}
    batch = encode_rows(tokenizer, [dropped, usable])
    assert batch["dropped"] == ["equal_answers", ""]
    assert batch["prompt_ids"][1] == tokenizer(HH.replace(QUESTION, SKY))["input_ids"]
    assert batch["prompt_ids"][1] == encode(tokenizer, usable)["prompt_ids"]


def test_no_prompt_of_a_batch_ends_with_an_added_eos(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    usable = {"prompt": SKY, "chosen": " blue.", "rejected": " green."}
    batch = encode_rows(tokenizer, [{**usable, "prompt": f"{SKY}{end[0]}"}, usable, {**usable, "rejected": " blue."}])
    assert tokenizer.decode(batch["prompt_ids"][1]) == HH.replace(QUESTION, SKY)
    assert batch["chosen_ids"][1].count(end[1]) == 1


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("end", ["{eos}", "{eos}{eos}", "{eos}\n", " {eos} "])
def test_an_answer_with_its_own_eos_ends_with_one_eos(end, kind, plain_tokenizer, chat_tokenizer):
    tokenizer = plain_tokenizer if kind == "plain" else chat_tokenizer
    end = end.format(eos=tokenizer.eos_token)
    ids = encode(tokenizer, {"prompt": SKY, "chosen": f" blue.{end}", "rejected": " green."})["chosen_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "", "chosen": " blue.", "rejected": " green."},
        {"chosen": "Blue.", "rejected": "Green."},
        {"chosen": [assistant(YES)], "rejected": [assistant(NO)]},
    ],
    ids=["empty text", "no common beginning", "no message before the answer"],
)
def test_a_row_without_a_prompt_is_dropped_with_any_tokenizer(row, kind, plain_tokenizer, chat_tokenizer):
    tokenizer = plain_tokenizer if kind == "plain" else chat_tokenizer
    form = IMPLICIT if isinstance(row["chosen"], str) and "prompt" not in row else None
    assert encode(tokenizer, row, form=form)["dropped"] == "empty_prompt"


@pytest.mark.parametrize(
    "turns",
    [[{"role": "system", "content": "Be brief."}, USER], [USER, USER], [USER, assistant("Well."), assistant("Hm.")]],
    ids=["system", "two questions", "two answers"],
)
def test_a_row_that_the_template_refuses_is_dropped(turns, chat_tokenizer):
    """As with Gemma and Mistral: no system turn, and alternating roles."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% endfor %}" + tokenizer.chat_template
    )
    usable = {"prompt": [USER], "chosen": [assistant(YES)], "rejected": [assistant(NO)]}
    dropped = encode_rows(tokenizer, [usable, {**usable, "prompt": turns}])["dropped"]
    assert dropped[0] == ""
    assert dropped[1] != ""


def test_a_template_without_the_assistants_turn_is_refused(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ModelError, match="leaves out the assistant's answer"):
        Renderer(tokenizer)


def test_an_end_of_turn_other_than_eos_is_the_last_token(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    ids = encode(tokenizer, EXPECTED["HH prompt"][0])["chosen_ids"]
    assert ids == tokenizer(f"{YES}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in ids


def test_a_think_block_of_the_prompt_is_not_repeated(chat_tokenizer):
    """As with Qwen3 without thinking: the template begins the turn with an empty think block and keeps it."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    think = "<think>\\n\\n</think>\\n\\n"
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}" + think + "{% endif %}{{ message['content'] }}",
    ).replace("<|im_start|>assistant\n", "<|im_start|>assistant\n" + think)
    ids = encode(tokenizer, EXPECTED["UltraFeedback"][0])
    whole = tokenizer.apply_chat_template([USER, assistant(YES)], tokenize=False)
    assert whole.count("<think>") == 1
    assert tokenizer.decode(ids["prompt_ids"] + ids["chosen_ids"]) == whole.removesuffix("\n")
    assert tokenizer.decode(ids["chosen_ids"]) == f"{YES}<|im_end|>"


@pytest.mark.parametrize("limits", [LengthLimits(1, None, None), LengthLimits(None, None, 2), LengthLimits(2, None, 2)])
def test_a_bos_is_not_kept_alone(limits, chat_tokenizer):
    """A prompt of only a BOS has no text to answer."""
    tokenizer = with_bos(chat_tokenizer, "<|im_start|>")
    assert encode(tokenizer, EXPECTED["HH prompt"][0], limits)["dropped"] == "no_room"


def test_answers_that_differ_only_after_the_limit_are_dropped(plain_tokenizer):
    row = {"prompt": SKY, "chosen": " blue, of course!", "rejected": " blue, not green."}
    assert encode(plain_tokenizer, row, LengthLimits(None, 2, None))["dropped"] == "equal_after_cut"


class CountingTokenizer:
    """The Rust tokenizer of a renderer, and the texts that it has encoded."""

    def __init__(self, fast) -> None:
        self.fast, self.texts = fast, []

    def encode_batch_fast(self, texts, **options):
        self.texts += texts
        return self.fast.encode_batch_fast(texts, **options)


def test_a_text_that_comes_again_is_not_encoded_again(plain_tokenizer):
    rows = [{"prompt": SKY, "chosen": " blue.", "rejected": f" {colour}."} for colour in ("red", "blue", "red")]
    encoder = Encoder(Renderer(plain_tokenizer), find_layout(Dataset.from_list(rows), "rows"), NO_LIMITS)
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    expected = encoder(batch, range(3))
    counting = encoder.renderer.fast = CountingTokenizer(encoder.renderer.fast)
    encoder.renderer._cache = TextCache()
    assert encoder(batch, range(3)) == encoder(batch, range(3)) == expected
    assert sorted(counting.texts) == sorted(
        [f"\n\nHuman: {SKY}\n\nAssistant:", " blue.<|endoftext|>", " red.<|endoftext|>"]
    )


def test_kept_texts_have_a_bound(monkeypatch):
    monkeypatch.setattr(text_cache, "MOST_LETTERS", 10)
    cache = TextCache()
    for text in ("four", "letters", "far too many letters"):
        cache.add(text, [1, 2], special=False)
    assert [cache.get(text, special=False) for text in ("four", "letters", "far too many letters")] == [None] * 3
    cache.add("four", [1, 2], special=False)
    assert cache.get("four", special=False) == [1, 2] and cache.get("four", special=True) is None


def test_kept_texts_do_not_change_the_hash_of_an_encoder(plain_tokenizer):
    rows = Dataset.from_list([{"prompt": SKY, "chosen": " blue.", "rejected": " red."}])
    encoder = Encoder(Renderer(plain_tokenizer), find_layout(rows, "rows"), NO_LIMITS)
    before = Hasher.hash(encoder)
    encoder(rows[:1], [0])
    assert Hasher.hash(encoder) == before
