"""What rows say: used, named as unused, or refused where it would change what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

import lorakin as lk
from lorakin.training import formats
from lorakin.training.chat_templates import use_template
from lorakin.training.contents import Conversation, Judged, PlainText, Preference
from lorakin.training.encoding import encode
from lorakin.training.reading import read_rows, unused
from lorakin.training.token_labels import IGNORED
from training.carried import templates, tokenizer_of
from training.test_templates import CHATML, learned

Write = Callable[..., str]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def said(row: dict[str, Any], write_rows: Write, **options: Any) -> Any:
    return read_rows(write_rows([row]), **options).records[0].content


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"system": "s", "conversations": SHARED},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"conversations": TURNS}, [("user", "q"), ("assistant", "a")]),
        ({"messages": json.dumps(TURNS)}, [("user", "q"), ("assistant", "a")]),
        ({"system": "s", "messages": TURNS}, [("system", "s"), ("user", "q"), ("assistant", "a")]),
        (
            {
                "instruction": "and Italy?",
                "input": "",
                "output": "Rome",
                "system": "s",
                "history": [["France?", "Paris"]],
            },
            [
                ("system", "s"),
                ("user", "France?"),
                ("assistant", "Paris"),
                ("user", "and Italy?"),
                ("assistant", "Rome"),
            ],
        ),
        (
            {"instruction": "When?", "context": "ctx", "response": "2000", "category": "qa"},
            [("user", "When?\n\nctx"), ("assistant", "2000")],
        ),
        (
            {"instruction": "Valid?", "input": "null", "output": "yes"},
            [("user", "Valid?\n\nnull"), ("assistant", "yes")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, TURNS[1]]},
            [("user", "q"), ("assistant", "a")],
        ),
        ({"prompt": TURNS[:1], "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"prompt": "q", "completion": "a", "system": "s"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
    ],
)
def test_conversations_in_many_layouts(
    row: dict[str, Any], expected: list[tuple[str, str]], write_rows: Write
) -> None:
    content = said(row, write_rows)
    assert isinstance(content, Conversation)
    assert [(message["role"], message["content"]) for message in content.messages] == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "Who?", "context": "ctx", "answer": "Ann"}, PlainText("Who?\n\nctx", "Ann")),
        (
            {
                "question": "Who?",
                "context": "ctx",
                "answers": {"text": ["Ann"], "answer_start": [3]},
            },
            PlainText("Who?\n\nctx", "Ann"),
        ),
        ({"query": "Who?", "response": "Ann"}, PlainText("Who?", "Ann")),
        ({"prompt": '["a", "b"]', "completion": '{"a": 1}'}, PlainText('["a", "b"]', '{"a": 1}')),
    ],
)
def test_texts_in_many_layouts(row: dict[str, Any], expected: PlainText, write_rows: Write) -> None:
    assert said(row, write_rows) == expected


def test_calls_of_tools_are_one_form(write_rows: Write) -> None:
    expected = [
        {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Oslo"}},
        }
    ]
    openai = {
        "messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "tools": [TOOL],
    }
    packed = {"messages": openai["messages"], "tools": json.dumps([TOOL["function"]])}
    for row in (openai, packed):
        content = said(row, write_rows)
        assert content.messages[1] == {"role": "assistant", "content": "", "tool_calls": expected}
        assert content.tools == [TOOL]
    share = [
        SHARED[0], {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": '
                                                      '"Oslo"}}'},
        {"from": "observation", "value": "rain"}, SHARED[1],
    ]  # fmt: skip
    content = said({"conversations": share, "tools": "[]"}, write_rows)
    assert [message["role"] for message in content.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert content.messages[1]["tool_calls"][0]["function"] == expected[0]["function"]
    assert content.tools is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "q", "response": "a", "label": False}, "label false marks an answer"),
        ({"messages": TURNS, "chosen": "b"}, "chosen makes it a row of preferences"),
        ({"conversations": SHARED, "chosen": SHARED[1], "rejected": SHARED[1]}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "an empty preference: rejected"),
        ({"chosen": TURNS, "rejected": TURNS}, "says nothing after the prompt"),
        ({"chosen": "yes", "rejected": "yes it is"}, "an empty preference: chosen"),
        ({"chosen": TURNS, "rejected": TURNS[1:]}, "no prompt|begin with"),
        ({"prompt": "q", "chosen": [TURNS[0]], "rejected": "b"}, "expected an answer"),
        ({"messages": TURNS[:1], "rejected_response": "b"}, "does not end with an answer"),
        ({"prompt": "q", "completion": " ", "label": True}, "the answer is empty"),
        (
            {"messages": TURNS, "images": ["1.jpg"]},
            r'images is \["1.jpg"\], and only text can be '
            r"trained on",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]},
            'part of type "image"',
        ),
        (
            {"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]},
            "a message's weight is 0.5; only 0 and 1",
        ),
        ({"messages": TURNS, "loss_weight": 2}, "the row's loss_weight is 2"),
        (
            {"conversations": [SHARED[0], {"from": "function_call", "value": "{}"}]},
            r"function_call is \{\}, expected a name",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
            "the assistant's content is null",
        ),
        (
            {
                "messages": [
                    TURNS[0],
                    {
                        "role": "assistant",
                        "tool_calls": [{**CALL, "function": {"name": "a", "arguments": "("}}],
                    },
                ]
            },
            'the arguments of a are "\\(", expected a JSON object',
        ),
        ({"messages": TURNS, "tools": "none"}, 'tools is "none", expected a list'),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "expected pairs"),
        ({"prompt": "q", "completion": True}, "completion is true, expected text"),
        ({"prompt": "q", "completion": None}, "completion is null"),
        (
            {"messages": [SHARED[0] | {"from": "system"}, *TURNS], "system": "b"},
            "a system column and a system message",
        ),
    ],
)
def test_what_changes_the_meaning_is_refused(
    row: dict[str, Any], message: str, write_rows: Write
) -> None:
    with pytest.raises(lk.DataError, match=f"row 1: .*{message}.*The row: "):
        said(row, write_rows)


OTHER = {"role": "assistant", "content": "b"}
GPT = {"from": "gpt", "value": "b"}
SYSTEM_TURN = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": TURNS, "rejected": [TURNS[0], OTHER]}, TURNS[:1]),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [OTHER]}, TURNS[:1]),
        ({"prompt": "q", "system": "s", "chosen": "a", "rejected": "b"}, [SYSTEM_TURN, TURNS[0]]),
        ({"chosen": TURNS, "rejected": [TURNS[0], OTHER]}, TURNS[:1]),
        ({"chosen": json.dumps(TURNS), "rejected": json.dumps([TURNS[0], OTHER])}, TURNS[:1]),
        ({"messages": TURNS, "rejected_response": "b"}, TURNS[:1]),
        ({"messages": TURNS, "rejected_messages": [TURNS[0], OTHER]}, TURNS[:1]),
        ({"conversations": SHARED[:1], "chosen": SHARED[1], "rejected": GPT}, TURNS[:1]),
        (
            {
                "chosen": "\n\nHuman: q\n\nAssistant: a",
                "rejected": "\n\nHuman: q\n\nAssistant: b",
            },
            TURNS[:1],
        ),
    ],
)
def test_pairs_of_answers(row: dict[str, Any], prompt: list[Any], write_rows: Write) -> None:
    for known in (row, row | {"prompt_id": "x", "score_chosen": 2.0}):
        rows = read_rows(write_rows([known]))
        assert (rows.task, rows.formats) == ("dpo", ["preference"])
        pair = rows.records[0].content
        assert pair.chosen.messages == [*prompt, TURNS[1]]
        assert pair.rejected.messages == [*prompt, OTHER]
        assert pair.chosen.learned == [False] * len(prompt) + [None]


def test_pairs_of_texts(write_rows: Write) -> None:
    pair = said({"prompt": "q", "chosen": "a", "rejected": "b"}, write_rows)
    assert pair == Preference(PlainText("q", "a"), PlainText("q", "b"))
    pair = said({"instruction": "do", "input": "it", "chosen": "a", "rejected": "b"}, write_rows)
    assert pair.chosen == PlainText("do\n\nit", "a")
    shared = said({"chosen": "the cat sat", "rejected": "the cab ran"}, write_rows)
    assert shared.chosen == PlainText("the", " cat sat", is_raw=True)
    named = {"prompt": "ask", "chosen": "good", "rejected": "poor"}
    row = {"ask": "q", "good": "a", "poor": "b", "messages": TURNS}
    assert said(row, write_rows, columns=named).rejected == PlainText("q", "b")


@pytest.mark.parametrize("verdict", [True, False, "true", 0, 1.0])
def test_verdicts(verdict: Any, write_rows: Write) -> None:
    good = verdict in (1, "true")
    asked = {"prompt": "q", "completion": "a", "label": verdict}
    assert said(asked, write_rows) == Judged(PlainText("q", "a"), good)
    turns = [*TURNS, TURNS[0], OTHER]
    found = said({"messages": turns, "label": verdict}, write_rows)
    assert found.answer.learned == [False, False, False, None]
    assert found.is_good == good
    tagged = {"instruction": "q", "output": "a", "kto_tag": verdict}
    assert said(tagged, write_rows).is_good == good


def test_other_labels_are_no_verdicts(write_rows: Write) -> None:
    row = {"prompt": "q", "completion": "a", "label": "sports"}
    assert said(row, write_rows) == PlainText("q", "a")


def test_columns_say_what_is_meant(write_rows: Write) -> None:
    row = {"chosen": "good", "rejected": "bad", "query": "q", "images": ["x"], "weight": 70.5}
    assert said(row, write_rows, columns={"prompt": "query", "completion": "chosen"}) == PlainText(
        "q", "good"
    )
    with pytest.raises(lk.DataError, match="missing"):
        said(row, write_rows, columns={"prompt": "missing", "completion": "chosen"})
    with pytest.raises(lk.DataError, match="have the columns prompt|has the columns prompt"):
        said(row, write_rows, columns={"prompt": "query"})
    both = {"text": "a", "label": "b"}
    assert said(both, write_rows, layout="text") == PlainText("", "a")
    with pytest.raises(lk.DataError):
        said(both, write_rows, layout="csv")


def test_keys_that_are_not_used_are_named(write_rows: Write) -> None:
    rows = [
        {"messages": [TURNS[0] | {"id": 3}, TURNS[1]], "source": "web", "empty": None},
        {"messages": TURNS, "source": "x"},
    ]
    assert (
        unused(read_rows(write_rows(rows)))
        == "not used: source (in 2 rows), messages[].id (in 1 rows)"
    )
    assert unused(read_rows(write_rows([{"messages": TURNS}]))) is None


def test_rows_and_turns_that_are_not_to_be_learned(write_rows: Write) -> None:
    tokenizer = tokenizer_of(CHATML)
    wrong = {"role": "assistant", "content": "WRONG", "weight": 0}
    rows = read_rows(
        write_rows([{"messages": [TURNS[0], wrong, *TURNS]}, {"messages": TURNS, "train": False}])
    )
    assert (len(rows), rows.left_out) == (1, 1)
    example = encode(rows, tokenizer, 500).examples[0]
    assert learned(example["input_ids"], example["labels"], tokenizer) == ["a<|im_end|>"]
    assert "WRONG" in tokenizer.decode(example["input_ids"])


def test_of_a_conversational_prompt_only_the_completion_is_learned(write_rows: Write) -> None:
    tokenizer = tokenizer_of(CHATML)
    row = {
        "prompt": [*TURNS, {"role": "user", "content": "q2"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    example = encode(read_rows(write_rows([row])), tokenizer, 500).examples[0]
    assert learned(example["input_ids"], example["labels"], tokenizer) == ["b<|im_end|>"]


@pytest.mark.parametrize("loss_on", ["answers", "last", "all"])
def test_what_the_loss_is_on(loss_on: str, write_rows: Write) -> None:
    tokenizer = tokenizer_of(CHATML)
    rows = read_rows(
        write_rows(
            [
                {
                    "messages": [
                        *TURNS,
                        {"role": "user", "content": "q2"},
                        {"role": "assistant", "content": "b"},
                    ]
                }
            ]
        )
    )
    example = encode(rows, tokenizer, 500, loss_on).examples[0]
    parts = learned(example["input_ids"], example["labels"], tokenizer)
    assert parts == {"answers": ["a<|im_end|>", "b<|im_end|>"], "last": ["b<|im_end|>"]}.get(
        loss_on, [tokenizer.decode(example["input_ids"])]
    )


def test_instructions_without_a_template_get_alpacas_prompt(write_rows: Write) -> None:
    alpaca = read_rows(write_rows([{"instruction": "say 0", "input": "", "output": "it is 0"}]))
    for chosen, template in ((True, None), (False, CHATML), ("alpaca", CHATML)):
        tokenizer = tokenizer_of(template, eos="</s>")
        assert use_template(tokenizer, chosen, alpaca) is not None
        example = encode(alpaca, tokenizer, 500).examples[0]
        text = tokenizer.decode(example["input_ids"])
        assert text.endswith("\n\n### Instruction:\nsay 0\n\n### Response:\nit is 0</s>")
        assert learned(example["input_ids"], example["labels"], tokenizer) == ["it is 0</s>"]
    tokenizer = tokenizer_of(None, eos="</s>")
    chat = read_rows(write_rows([{"messages": TURNS}]))
    assert use_template(tokenizer, True, chat) is None
    with pytest.raises(lk.DataError):
        encode(chat, tokenizer, 500)


def test_variables_of_a_template(write_rows: Write) -> None:
    rows = read_rows(write_rows([{"messages": TURNS}]))
    tokenizer = tokenizer_of(
        CHATML.replace(
            "assistant\n' }}", "assistant\n' }}{% if not quiet %}{{ 'LOUD ' }}{% endif %}"
        )
    )
    use_template(tokenizer, True, rows, {"quiet": True})
    example = encode(rows, tokenizer, 500).examples[0]
    assert learned(example["input_ids"], example["labels"], tokenizer) == ["a<|im_end|>"]
    nemotron = tokenizer_of(templates()["trl/chat_templates/nemotron_3_nano.jinja"])
    with pytest.raises(lk.DataError, match="--template-arg"):
        encode(rows, nemotron, 500)
    use_template(nemotron, True, rows, {"enable_thinking": False})
    example = encode(rows, nemotron, 500).examples[0]
    assert learned(example["input_ids"], example["labels"], nemotron) == ["a<|im_end|>"]
    for arguments in ({"a-b": 1}, {"a": [1]}):
        with pytest.raises(lk.DataError, match="--template-arg"):
            use_template(tokenizer, True, rows, arguments)


def test_text_that_is_rendered_already_gets_no_second_bos_or_eos(write_rows: Write) -> None:
    import tokenizers

    tokenizer = tokenizer_of("{{ '<|begin_of_text|><|eot_id|>' }}")
    begin = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    rows = read_rows(write_rows([{"text": "<|begin_of_text|>hi<|eot_id|>"}, {"text": "hi"}]))
    first, second = encode(rows, tokenizer, 500).examples
    assert (
        tokenizer.decode(first["input_ids"])
        == tokenizer.decode(second["input_ids"])
        == "<|begin_of_text|>hi<|eot_id|>"
    )
    assert first["labels"][-1] != IGNORED


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "conversations": [{"from": "Human", "value": "q"}, {"from": "ai", "value": "a"}],
                "system_prompt": "s",
            },
            "s q a",
        ),
        ({"messages": [{"role": "system", "content": None}, *TURNS], "system": "s"}, "s q a"),
        ({"messages": [{"role": "user", "content": None, "value": "q"}, TURNS[1]]}, "q a"),
        ({"messages": [{"role": "system", "content": ""}, *TURNS]}, "q a"),
    ],
)
def test_usual_variants(row: dict[str, Any], expected: str, write_rows: Write) -> None:
    assert " ".join(message["content"] for message in said(row, write_rows).messages) == expected


def test_calls_in_the_shapes_that_data_sets_have(write_rows: Write) -> None:
    call = {"name": "weather", "arguments": {"city": None, "days": 3}}
    rows = [
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": "Let me see.", "function_call": call},
            ],
            "functions": [TOOL],
        },
        {
            "conversations": [SHARED[0], {"from": "function_call", "value": json.dumps([call])}],
            "tools": [TOOL],
        },
        {"query": "q", "answers": json.dumps([call]), "tools": json.dumps([TOOL["function"]])},
    ]
    for row in rows:
        content = said(row, write_rows)
        assert [inner["function"] for inner in content.messages[1]["tool_calls"]] == [call]
        assert content.tools == [TOOL]
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    empty = said({"messages": [TURNS[0], called]}, write_rows)
    assert empty.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_nulls_that_a_table_fills_in_are_none_of_a_calls(tmp_path: Any) -> None:
    import datasets

    rows = [
        {
            "messages": [
                {**TURNS[0], "tool_calls": None},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"opts": {key: 1}}}}],
                },
            ]
        }
        for key in ("deep", "wide")
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    found = read_rows(str(tmp_path / "rows.parquet")).records[0].content
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"opts": {"deep": 1}}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "prompt",
    ['{"role": "user", "content": "a", "id": 3}', '[{"from": "a@b.c"}]', '[{"role": "admin"}]'],
)
def test_a_prompt_that_is_json_is_a_text(prompt: str, write_rows: Write) -> None:
    assert said({"prompt": prompt, "completion": "ok"}, write_rows) == PlainText(prompt, "ok")


def test_a_prompt_that_is_rendered_already_is_not_wrapped_again(write_rows: Write) -> None:
    tokenizer = tokenizer_of(CHATML)
    row = {
        "prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "completion": "yes<|im_end|>",
    }
    text = {"text": row["prompt"] + "yes<|im_end|>\n"}
    first, second = (
        encode(read_rows(write_rows([one])), tokenizer, 500).examples[0] for one in (row, text)
    )
    assert tokenizer.decode(first["input_ids"]) == row["prompt"] + row["completion"]
    assert learned(first["input_ids"], first["labels"], tokenizer) == ["yes<|im_end|>"]
    assert tokenizer.decode(second["input_ids"]) == text["text"], "and a text has no second end"


def test_a_flag_among_the_columns_counts(write_rows: Write) -> None:
    rows = [{"q": "q", "r": "r", "w": 0}, {"q": "q", "r": "r", "w": "1"}]
    found = read_rows(write_rows(rows), {"prompt": "q", "completion": "r", "weight": "w"})
    assert (len(found), found.left_out) == (1, 1)


def test_rows_whose_answers_are_cut_are_counted(write_rows: Write) -> None:
    rows = read_rows(
        write_rows([{"prompt": "q", "completion": "b" * 300}, {"prompt": "q", "completion": "b"}])
    )
    encoded = encode(rows, tokenizer_of(CHATML), 100)
    assert (len(encoded.examples), encoded.dropped, encoded.cut) == (2, 0, 1)


@pytest.mark.parametrize("label", [False, 0, "False"])
def test_answers_not_to_imitate_however_they_are_marked(label: Any, write_rows: Write) -> None:
    imitate = {"layout": "prompt/completion"}
    with pytest.raises(lk.DataError):
        said({"prompt": "q", "completion": "bad", "label": label}, write_rows, **imitate)
    good = {"prompt": "q", "completion": "good", "label": True}
    assert said(good, write_rows, **imitate) == PlainText("q", "good")


def test_pairs_of_texts_are_no_single_text(write_rows: Write) -> None:
    with pytest.raises(lk.DataError):
        said({"sentence": "s", "context": "c", "label": 1, "idx": 3}, write_rows)


def test_a_format_that_lacks_one_column_is_named() -> None:
    for row, name, lacking in (
        ({"prompt": "a", "chosen": "b"}, "preference", "rejected"),
        ({"sentence1": "a", "sentence2": "b", "idx": 1}, "classification", "label"),
    ):
        with pytest.raises(lk.DataError) as error:
            formats.detected([row], "rows.jsonl", None)
        assert name in str(error.value)
        assert f"{lacking} is missing" in str(error.value)
    with pytest.raises(lk.DataError, match="--columns sentence1=Sentence1"):
        formats.detected([{"Sentence1": "a", "sentence2": "b", "label": 1}], "rows.jsonl", None)
