"""Every chat template that installed packages carry: what is learned is exactly the answers, or it
is refused.
"""

from __future__ import annotations

import datetime
import itertools
from typing import Any

import pytest
import transformers

import lorakin as lk
from lorakin.training.answers import ANSWERS, LAST, Answers
from lorakin.training.contents import Conversation
from lorakin.training.templates import Template
from lorakin.training.token_labels import IGNORED, Unverified, continued
from training.carried import MISTRAL, spaced_tokenizer, templates, tokenizer_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def reply(words: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words, **more}


CALLS = [
    {
        "type": "function",
        "id": "abc123def",
        "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
    }
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where"}},
                "required": ["city"],
            },
        },
    }
]
THOUGHT = "<think>\nMused zzt\n</think>\n\n"
ONE = [user("Asked1 zzq"), reply("Replied1")]
MORE = [user("Asked2 zzq"), reply("Replied2"), user("Asked3 zzq"), reply("Replied3")]
SYSTEM = {"role": "system", "content": "Be brief zzq."}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any, list[list[str]]]] = {
    "one turn": (ONE, None, [["Replied1"]]),
    "system": ([SYSTEM, *ONE], None, [["Replied1"]]),
    "several turns": ([*ONE, *MORE], None, [["Replied1"], ["Replied2"], ["Replied3"]]),
    "system, several turns": (
        [SYSTEM, *ONE, *MORE],
        None,
        [["Replied1"], ["Replied2"], ["Replied3"]],
    ),
    "reasoning": (
        [user("Asked1 zzq"), reply(THOUGHT + "Replied1")],
        None,
        [["Mused zzt", "Replied1"]],
    ),
    "reasoning_content": (
        [user("Asked1 zzq"), reply("Replied1", reasoning_content="Mused zzt")],
        None,
        [["Mused zzt", "Replied1"]],
    ),
    "reasoning, several turns": (
        [
            user("Asked1 zzq"),
            reply(THOUGHT + "Replied1"),
            user("Asked2 zzq"),
            reply(THOUGHT + "Replied2"),
        ],
        None,
        [["Mused zzt", "Replied1"], ["Mused zzt", "Replied2"]],
    ),
    "tools": (
        [
            user("Asked1 zzq"),
            reply("", tool_calls=CALLS),
            {
                "role": "tool",
                "name": "get_weather",
                "tool_call_id": "abc123def",
                "content": "rain zzq",
            },
            reply("Replied2"),
        ],
        TOOLS,
        [["get_weather", "Oslo"], ["Replied2"]],
    ),
}


def learned(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """The learned parts as text."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    parts = itertools.groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in part]) for learns, part in parts if learns]


def outcome(template: Template, name: str, loss_on: str) -> str:
    """verified, refused, or what is wrong."""
    messages, tools, answers = CONVERSATIONS[name]
    try:
        ids, labels = Answers(template).encode(
            Conversation(messages, [None] * len(messages), tools), loss_on
        )
    except lk.DataError:
        return "refused"
    tokenizer = template.tokenizer
    parts = learned(ids, labels, tokenizer)
    expected = answers if loss_on == ANSWERS else answers[-1:]
    if len(parts) != len(expected):
        return f"{len(parts)} parts"
    for part, words in zip(parts, expected, strict=True):
        at = [part.find(word) for word in words]
        if (
            -1 in at
            or at != sorted(at)
            or "zzq" in part
            or (name.startswith("reasoning") is False and "zzt" in part)
        ):
            return repr(part)
        if part.count("Replied") > 1 or tokenizer.convert_tokens_to_ids(
            tokenizer.tokenize(part)[-1]
        ) not in specials(tokenizer):
            return repr(part)
    prompts = [
        at for at, label in enumerate(labels) if label != IGNORED and labels[at - 1] == IGNORED
    ]
    asked = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    for start, at in zip(prompts, asked if loss_on == ANSWERS else asked[-1:], strict=True):
        prompt = tokenizer.apply_chat_template(
            told(messages[:at], template), tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if ids[:start] != prompt:
            return "another prompt than generation sends"
    return "verified"


def told(messages: list[dict[str, Any]], template: Template) -> list[dict[str, Any]]:
    """The messages in the form that templates of models with pictures take, where this one is
    such.
    """
    if not template.takes_parts:
        return messages
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def specials(tokenizer: Any) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("name", sorted(templates()))
def test_carried_templates_are_verified_or_refused(name: str) -> None:
    template = Template(tokenizer_of(templates()[name]))
    found = {(c, on): outcome(template, c, on) for c in CONVERSATIONS for on in (ANSWERS, LAST)}
    wrong = {key: value for key, value in found.items() if value not in ("verified", "refused")}
    assert not wrong
    assert "verified" in found.values()


def test_most_are_verified() -> None:
    """So that refusing everything is no way to pass."""
    found = [
        outcome(Template(tokenizer_of(text)), name, ANSWERS)
        for text in templates().values()
        for name in ("one turn", "several turns")
    ]
    assert found.count("verified") > 0.8 * len(found)


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        (
            "trl/chat_templates/qwen3.jinja",
            "several turns",
            [
                "Replied1<|im_end|>",
                "Replied2<|im_end|>",
                "<think>\n\n</think>\n\nReplied3<|im_end|>",
            ],
        ),
        ("mistral", "system", [" Replied1</s>"]),
        (
            "trl/chat_templates/deepseek_r1_distill.jinja",
            "reasoning",
            ["Mused zzt\n</think>\n\nReplied1<｜end▁of▁sentence｜>"],
        ),
        ("trl/chat_templates/glm4moe.jinja", "one turn", ["\n<think></think>\nReplied1<|user|>"]),
        ("trl/chat_templates/phi3.jinja", "one turn", ["Replied1<|end|>"]),
        (
            "trl/chat_templates/cohere2.jinja",
            "one turn",
            ["Replied1<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        ),
        (
            "trl/chat_templates/gptoss.jinja",
            "reasoning",
            [
                "<|channel|>analysis<|message|>Mused "
                "zzt<|end|><|start|>assistant<|channel|>final<|message|>Replied1<|return|>"
            ],
        ),
        (
            "trl/chat_templates/qwen2_5.jinja",
            "tools",
            [
                '<tool_call>\n{"name": "get_weather", "arguments": {"city": '
                '"Oslo"}}\n</tool_call><|im_end|>',
                "Replied2<|im_end|>",
            ],
        ),
    ],
)
def test_what_well_known_templates_learn(template: str, name: str, expected: list[str]) -> None:
    tokenizer = tokenizer_of(templates()[template])
    messages, tools, _ = CONVERSATIONS[name]
    ids, labels = Answers(Template(tokenizer)).encode(
        Conversation(messages, [None] * len(messages), tools)
    )
    assert learned(ids, labels, tokenizer) == expected


def test_what_cannot_be_verified_is_refused_with_the_way_out() -> None:
    mistral = Template(tokenizer_of(MISTRAL))
    messages = [SYSTEM, *ONE, *MORE]
    with pytest.raises(Unverified, match="--loss-on"):
        Answers(mistral).encode(Conversation(messages, [None] * len(messages)))
    ids, labels = Answers(mistral).encode(Conversation(messages, [None] * len(messages)), LAST)
    assert learned(ids, labels, mistral.tokenizer) == [" Replied3</s>"]
    assert "Be brief zzq.\n\nAsked3" in mistral.tokenizer.decode(ids)
    r1 = Template(tokenizer_of(templates()["trl/chat_templates/deepseek_r1_distill.jinja"]))
    with pytest.raises(Unverified):
        Answers(r1).encode(Conversation(ONE, [None, None]))
    dropping = Template(
        tokenizer_of(CHATML.replace("in messages", "in messages if m.role != 'system'"))
    )
    with pytest.raises(lk.DataError, match="message 1"):
        Answers(dropping).encode(Conversation([SYSTEM, *ONE], [None] * 3))
    with pytest.raises(lk.DataError):
        Answers(Template(tokenizer_of(CHATML))).encode(Conversation(ONE, [None] * 2, TOOLS))


CALLING = CHATML.replace(
    "m.content +", "m.content + (m.tool_calls[0].function|tojson if m.tool_calls else '') +"
)
BERGEN = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bergen"}}}


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (
            CHATML,
            [
                {"role": "system", "content": "Use get_weather."},
                user("a?"),
                reply("Look.", tool_calls=CALLS),
                *MORE,
            ],
        ),
        (CALLING, [user("a?"), reply("Look.", tool_calls=[*CALLS, BERGEN]), *MORE]),
        (
            CHATML.replace("in messages", "in messages if m.role != 'system'"),
            [
                {"role": "system", "content": "in French"},
                user("Say it in French: hello?"),
                reply("Bonjour"),
            ],
        ),
        (
            CHATML.replace("in messages", "in messages if m.role != 'tool'"),
            [
                user("Is 22 warm?"),
                reply("I check"),
                {"role": "tool", "content": "22"},
                reply("Yes"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("loss_on", [LAST, "all"])
def test_what_a_template_drops_is_seen_though_its_words_stand_elsewhere(
    template: str, messages: list[dict[str, Any]], loss_on: str
) -> None:
    with pytest.raises(lk.DataError):
        Answers(Template(tokenizer_of(template))).encode(
            Conversation(messages, [None] * len(messages)), loss_on
        )


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Say yes or no"}, user("yes"), reply("no")],
        [{"role": "system", "content": "a b a"}, user("a"), reply("b"), user("a"), reply("a")],
        [
            {"role": "system", "content": "in French"},
            user("Say it in French: hello?"),
            {"role": "developer", "content": "French"},
            reply("Bonjour"),
        ],
    ],
)
@pytest.mark.parametrize("loss_on", [LAST, "all"])
def test_what_is_said_may_stand_in_the_systems_words_too(
    messages: list[dict[str, Any]], loss_on: str
) -> None:
    ids, labels = Answers(Template(tokenizer_of(CHATML))).encode(
        Conversation(messages, [None] * len(messages)), loss_on
    )
    assert len(ids) == len(labels)
    dropping = CHATML.replace("in messages", "in messages[1:]")
    with pytest.raises(lk.DataError):
        Answers(Template(tokenizer_of(dropping))).encode(
            Conversation(messages, [None] * len(messages)), loss_on
        )


def test_the_loss_on_all_drops_no_reasoning() -> None:
    template = Template(tokenizer_of(CHATML))
    for message in (reply("ans", reasoning_content="secret"), reply("f", tool_calls=CALLS)):
        with pytest.raises(lk.DataError, match="message 2"):
            Answers(template).encode(Conversation([user("q"), message], [None, None]), "all")


@pytest.mark.parametrize(
    "name", [f"trl/chat_templates/{family}.jinja" for family in ("gptoss", "glm4moe", "qwen3")]
)
@pytest.mark.parametrize("word", ["a", "in", "user", "think", "c\r\n"])
def test_short_answers_are_not_taken_for_the_templates_own_letters(name: str, word: str) -> None:
    template = Template(tokenizer_of(templates()[name]))
    ids, labels = Answers(template).encode(
        Conversation([user("Pick"), reply(word), user("again"), reply("b")], [None] * 4)
    )
    first = learned(ids, labels, template.tokenizer)[0]
    assert word.strip() in first and first.count("<|") <= 4


def test_tags_in_what_is_no_reasoning_are_text() -> None:
    told = "Answer as <think> your reasoning </think><answer> the answer </answer>."
    messages = [
        {"role": "system", "content": told},
        user("What is <think>x</think>?"),
        reply("b <think>c</think>"),
        user("d"),
        reply("e"),
    ]
    template = Template(tokenizer_of(CHATML))
    ids, labels = Answers(template).encode(Conversation(messages, [None] * 5))
    assert learned(ids, labels, template.tokenizer) == [
        "b <think>c</think><|im_end|>",
        "e<|im_end|>",
    ]


def test_ends_that_were_added_as_no_special_tokens() -> None:
    tokenizer = tokenizer_of(None, eos="</s>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    ids, labels = Answers(Template(tokenizer)).encode(Conversation([*ONE, *MORE], [None] * 6))
    assert learned(ids, labels, tokenizer) == [
        "Replied1<|im_end|>",
        "Replied2<|im_end|>",
        "Replied3<|im_end|>",
    ]


@pytest.mark.parametrize(
    "answer", ["\n\nReplied1", " Replied1", "Répliqué 💥", "Replied1\n", "a<|im_end|>b"]
)
def test_answers_with_odd_edges(answer: str) -> None:
    """A tokenizer may join an answer's first characters with what stands before it; the prompt is
    whole all the same.
    """
    tokenizer = tokenizer_of(CHATML)
    merged = tokenizer.backend_tokenizer
    assert (
        merged.add_tokens(["\n\n\n", "\n "]) == 2
    )  # as a trained tokenizer has tokens over the edge
    ids, labels = Answers(Template(tokenizer)).encode(
        Conversation([user("a"), reply(answer)], [None, None])
    )
    start = next(at for at, label in enumerate(labels) if label != IGNORED)
    assert ids[:start] == Template(tokenizer).prompt([user("a")])
    assert tokenizer.decode(ids[start:]).startswith(answer)
    assert learned(ids, labels, tokenizer)[0].endswith("<|im_end|>")


def test_the_ends_of_answers() -> None:
    tokenizer = tokenizer_of(CHATML, eos="<|endoftext|>")
    assert Template(tokenizer).endings.last == "<|im_end|>"
    plain = tokenizer_of(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", eos="</s>"
    )
    ids, labels = Answers(Template(plain)).encode(Conversation(ONE, [None, None]), LAST)
    assert learned(ids, labels, plain)[0].endswith("Replied1</s>"), (
        "an answer that no token ends would never end"
    )


def test_the_day_that_a_template_prints_is_the_runs() -> None:
    tokenizer = tokenizer_of("{{ strftime_now('%d %b %Y') }}" + CHATML)
    template = Template(tokenizer, datetime.date(2024, 7, 26))
    assert template.prints_the_day
    assert tokenizer.decode(template.prompt([user("a")])).startswith("26 Jul 2024")
    assert not Template(tokenizer_of(CHATML)).prints_the_day


def test_a_space_tokenizer_puts_no_second_space_before_a_completion() -> None:
    tokenizer = spaced_tokenizer()
    prompt, completion = "Q: capital?\nAnswer:", " Paris"
    whole = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer(completion, add_special_tokens=False)["input_ids"] != whole[len(start) :], (
        "alone it has two spaces"
    )
    assert start + continued(tokenizer, prompt, completion) == whole
    after_space = continued(tokenizer, prompt + " ", "Paris")
    assert (
        tokenizer.decode(
            tokenizer(prompt + " ", add_special_tokens=False)["input_ids"] + after_space
        )
        == prompt + " Paris"
    )


@pytest.mark.parametrize("over_the_edge", [[], ["\nrep"]])
def test_tokenising_grows_with_the_conversation_and_not_with_its_square(
    over_the_edge: list[str],
) -> None:
    counted = tokenizer_of(CHATML)
    counted.backend_tokenizer.add_tokens(over_the_edge)
    seen: list[int] = []

    class Counting(type(counted)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return super().__call__(text, **options)

    counted.__class__ = Counting

    def characters(turns: int) -> int:
        seen.clear()
        messages = [
            message
            for n in range(turns)
            for message in (user(f"asked {n:03}"), reply(f"replied {n:03}"))
        ]
        Answers(Template(counted)).encode(Conversation(messages, [None] * len(messages)))
        return sum(seen)

    assert characters(80) < 2.2 * characters(40)


def test_transformers_is_one_that_has_templates() -> None:
    assert len(templates()) > 40, transformers.__version__


@pytest.mark.parametrize("template", [5, {"a": CHATML, "b": CHATML}, {"default": 5}, ["x"]])
def test_a_template_that_is_no_text(template: Any) -> None:
    tokenizer = tokenizer_of(CHATML)
    tokenizer.chat_template = template
    with pytest.raises(lk.ModelError):
        Template(tokenizer).prompt([user("a")])
    with pytest.raises(lk.ModelError):
        _ = Template(tokenizer).prints_the_day
