"""The part of a recipe that says how much of the data is read, and how it becomes batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from lorakin.errors import SettingError
from lorakin.storage.schema import AtLeastOne, Check
from lorakin.training.recipe_option import DATA, Option

Weight = Annotated[
    float, Check("a number above 0", lambda value: value > 0 and math.isfinite(value))
]


@dataclasses.dataclass(kw_only=True)
class DataSettings:
    """Fields of `Recipe`: how many rows of each source, in which shares, and in which batches."""

    max_rows: Annotated[
        AtLeastOne | None,
        Option(DATA, "Train on the first N rows of each --data, and read no more.", default="all"),
    ] = None
    data_weights: Annotated[
        list[Weight],
        Option(
            DATA,
            "Shares of the rows that training sees, one for each --data: 2,1. Rows of a source "
            "that has too few are repeated.",
            default="each row once",
        ),
    ] = dataclasses.field(default_factory=list)
    group_by_length: Annotated[
        bool, Option(DATA, "Put rows of about the same length into a batch: less padding.")
    ] = False

    packing: Annotated[
        bool,
        Option(
            DATA,
            "Put several rows into a sequence of --max-length, none of which sees another; plain "
            "texts that are longer go on in the next. --batch-size then counts sequences.",
        ),
    ] = False

    streaming: Annotated[
        bool,
        Option(
            DATA,
            "Read rows while training, for data that does not fit in memory; needs --steps and "
            "--eval-data.",
        ),
    ] = False

    def check_data(self, sources: int, steps: int | None, eval_data: str | None) -> None:
        """Checks the fields against each other and against others of the recipe.

        Args:
            sources: how many `--data` there are.
            steps, eval_data: the recipe's.

        Raises:
            SettingError: they contradict each other.
        """
        if self.streaming:
            self._check_streaming(sources, steps, eval_data)
        if self.packing and self.group_by_length:
            raise SettingError(
                "--packing fills sequences to one length, so --group-by-length has nothing to "
                "group; give one of them"
            )
        if self.data_weights and len(self.data_weights) != sources:
            raise SettingError(
                f"--data-weights {','.join(f'{weight:g}' for weight in self.data_weights)} has "
                f"{len(self.data_weights)} weights, and there are {sources} --data; give one each"
            )

    def _check_streaming(self, sources: int, steps: int | None, eval_data: str | None) -> None:
        problem = ""
        if steps is None:
            problem = "does not know how many rows there are: give the run's length with --steps"
        elif eval_data is None:
            problem = "holds no rows out: give rows to evaluate on with --eval-data"
        elif sources > 1 and not self.data_weights:
            shares = ",".join(["1"] * sources)
            problem = (
                "does not know how many rows each --data has: give their shares with "
                f"--data-weights, such as {shares}"
            )
        elif self.group_by_length:
            problem = (
                "does not know the rows to come, so --group-by-length cannot sort them; leave it "
                "out, or take --packing"
            )
        if problem:
            raise SettingError(f"--streaming {problem}")
