"""What a model writes to the rows' prompts, compared with all answers that the data has to each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorakin.errors import DataError
from lorakin.training.contents import Conversation, PlainText, text_of
from lorakin.training.generate import answers
from lorakin.training.metrics import MetricValue, draws_of, interval, mean_interval
from lorakin.training.models import Loaded
from lorakin.training.prompts import Prompt, without_answer
from lorakin.training.reading import DataRows
from lorakin.training.records import Record
from lorakin.training.sampling import Sampling
from lorakin.training.speakers import Speaker

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_]+")
"""What ROUGE-L counts as a word: letters and digits of any script; Chinese and Japanese signs stand
alone. Of ASCII text these are rouge-score's own words, which know no other letters."""


@dataclasses.dataclass(frozen=True)
class Written:
    """Answers that a model wrote, with the metrics over the distinct prompts.

    Attributes:
        metrics: BLEU and chrF (sacrebleu's, 0 to 100), ROUGE-L (rouge-score's F, 0 to 100; with
            several right answers the best), and the share of exact matches.
        right, given: of each row its answer, and what the model wrote to its prompt.
        prompts: of each row the number of its prompt: rows with the same one share it.
    """

    metrics: Mapping[str, MetricValue]
    right: list[str]
    given: list[str]
    prompts: list[int]


def write_answers(
    loaded: Loaded,
    rows: DataRows,
    sampling: Sampling,
    batch_size: int,
    chat_template: bool = True,
) -> Written:
    """Generates the answer to each distinct prompt of rows, and compares.

    Rows with the same prompt give it several right answers, as in E2E NLG.

    Args:
        loaded: the model and its tokenizer, with its chat template.
        rows: prompts with their answers.
        sampling: how tokens are chosen.
        batch_size: answers at a time.
        chat_template: whether prompts go into the chat template, if there is one.

    Raises:
        DataError: a row has no prompt.
    """
    right = [_answer(record) for record in rows.records]
    asked = [without_answer(record.content) for record in rows.records]
    numbers: dict[str, int] = {}
    prompts: list[Prompt] = []
    of_row: list[int] = []
    for record, question in zip(rows.records, asked, strict=True):
        key = repr(question)
        if key not in numbers:
            numbers[key] = len(numbers)
            prompts.append(Prompt(numbers[key], record.where, record.values, question))
        of_row.append(numbers[key])

    speaker = Speaker.of(loaded, chat_template=chat_template)
    written: dict[int, str] = {}
    for batch in answers([(prompt, speaker) for prompt in prompts], sampling, batch_size):
        written |= {request.number: text.strip() for request, text in batch}
    references: list[list[str]] = [[] for _ in prompts]
    for number, answer in zip(of_row, right, strict=True):
        references[number].append(answer)
    given = [written[number] for number in range(len(prompts))]
    of_rows = [written[number] for number in of_row]
    return Written(scores(given, references), right, of_rows, of_row)


def scores(given: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, MetricValue]:
    """Returns the metrics of written answers, with 95 % intervals over draws of the prompts.

    >>> scores(["the cat"], [["the cat", "a cat"]])["exact_match"].value
    1.0

    Args:
        given: an answer to each prompt.
        references: the right answers to each.
    """
    from sacrebleu.metrics import BLEU, CHRF

    most = max(map(len, references))
    streams = [
        [answers[n] if n < len(answers) else None for answers in references] for n in range(most)
    ]
    found = {
        name: _scored(metric, given, streams)
        for name, metric in (("bleu", BLEU()), ("chrf", CHRF()))
    }
    pairs = list(zip(given, references, strict=True))
    found["rouge_l"] = _mean([100 * rouge_l(one, right) for one, right in pairs])
    return {**found, "exact_match": _mean([float(one in right) for one, right in pairs])}


def rouge_l(given: str, references: Sequence[str]) -> float:
    """Returns the F-measure of the longest common subsequence of words, with the best reference.

    >>> round(rouge_l("Die Tür ist offen", ["Die Tür war nie offen", "Auf!"]), 3)
    0.667

    Args:
        given: an answer.
        references: the right answers, at least one.
    """
    from rouge_score.rouge_scorer import RougeScorer  # which takes a second

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return float(scorer.score_multi(list(references), given)["rougeL"].fmeasure)


class _Words:
    """A tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def _mean(values: Sequence[float]) -> MetricValue:
    """Returns the mean over prompts, with an interval over draws of them if there are several."""
    bounds = mean_interval(np.array(values), np.ones(len(values))) if len(values) > 1 else ()
    return MetricValue(float(np.mean(values)), *bounds)


def _scored(
    metric: Any, given: Sequence[str], streams: Sequence[Sequence[str | None]]
) -> MetricValue:
    """Returns sacrebleu's score, with an interval over draws of the prompts if there are several.

    Its own bootstrap fails where draws score 0 (sacrebleu 2.6), so its sums of counts are drawn
    here.
    """
    value = float(metric.corpus_score(list(given), streams).score)
    if len(given) < 2:
        return MetricValue(value)
    counts = np.array(metric._extract_corpus_statistics(list(given), streams))
    drawn = draws_of(len(given)) @ counts
    return MetricValue(
        value, *interval([metric._compute_score_from_stats(list(row)).score for row in drawn])
    )


def _answer(record: Record) -> str:
    content = record.content
    if isinstance(content, PlainText) and content.prompt:
        return content.answer.strip()
    if isinstance(content, Conversation) and content.messages[-1]["role"] == "assistant":
        return text_of(content.messages[-1].get("content") or "", "content").strip()
    raise DataError(
        f"{record.where}: it has no prompt and answer (format {record.source.format.name}), and "
        "--generate compares what is written to prompts"
    )
