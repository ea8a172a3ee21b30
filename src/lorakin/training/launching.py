"""Starts a run's processes, one for each GPU, with Accelerate's launcher."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence

import torch

from lorakin.errors import SettingError
from lorakin.training import processes

STAGES = (1, 2, 3)
"""The stages of DeepSpeed's ZeRO."""


def available() -> int:
    """Returns how many GPUs this process sees."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def wanted(gpus: str | None, fsdp: bool, zero: int | None) -> int | None:
    """Returns how many processes are to be started; None if this process does it all.

    Args:
        gpus: a number, "all", or None. With `fsdp` or `zero`, None means all.
        fsdp: whether FSDP2 shards the base.
        zero: a stage of DeepSpeed's ZeRO.

    Raises:
        SettingError: something else, more GPUs than there are, options that contradict each
            other or the launcher that started this process, or no DeepSpeed.
    """
    if fsdp and zero is not None:
        raise SettingError("--fsdp and --zero both shard the base; give one of them")
    if zero is not None and zero not in STAGES:
        raise SettingError(f"--zero takes a stage of ZeRO, 1, 2 or 3, not {zero}")
    if gpus is None and not fsdp and zero is None:
        return None
    if "LOCAL_RANK" in os.environ:
        _check_launched(gpus, fsdp, zero)
        return None
    there = available()
    count = there if gpus in (None, "all") else _number(gpus)
    if count > there or there == 0:
        asked = f"--gpus {gpus}" if gpus else "--fsdp" if fsdp else f"--zero {zero}"
        raise SettingError(
            f"{asked}: this machine has {there} GPU{'' if there == 1 else 's'} that torch can use; "
            f"{'leave it out to train on the CPU' if there == 0 else f'give at most {there}'}"
        )
    if zero is not None and importlib.util.find_spec("deepspeed") is None:
        raise SettingError(
            f"--zero {zero} needs DeepSpeed, which is not installed: pip install deepspeed"
        )
    return None if count == 1 and not fsdp and zero is None else count


def launch(count: int, fsdp: bool, zero: int | None, arguments: Sequence[str]) -> int:
    """Runs `lorakin` in as many processes, and returns the code with which the first one failed.

    What Accelerate's default config file says holds, where these settings say nothing else.

    Args:
        count: how many.
        fsdp, zero: as for `wanted`.
        arguments: of the command line, which each process is given.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A process that fails has said why.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    words = [*accelerate_options(count, fsdp, zero), "--module", "lorakin", *arguments]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode)
    except SignalException:
        raise KeyboardInterrupt from None
    return 0


def accelerate_options(count: int, fsdp: bool, zero: int | None) -> list[str]:
    """Returns the options of `accelerate launch`.

    >>> accelerate_options(2, fsdp=True, zero=None)[:5]
    ['--num_processes', '2', '--use_fsdp', '--fsdp_version', '2']
    """
    from accelerate.commands.config.config_args import default_config_file

    options = ["--num_processes", str(count)]
    has_config = os.path.isfile(default_config_file)
    if fsdp:
        options += ["--use_fsdp", "--fsdp_version", "2"]
    elif zero is not None:
        options += ["--use_deepspeed", "--zero_stage", str(zero)]
    elif not has_config:
        options += ["--multi_gpu"]
    if not has_config:
        options += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # Any port that is free.
        options += ["--main_process_port", "0"]
    return options


def _number(gpus: str | None) -> int:
    if gpus is None or not gpus.isdecimal() or int(gpus) < 1:
        raise SettingError(f"--gpus takes a number of GPUs or all, not {gpus}")
    return int(gpus)


def _check_launched(gpus: str | None, fsdp: bool, zero: int | None) -> None:
    """Checks that the launcher that started this process did what the options say."""
    count = processes.count()
    if gpus not in (None, "all") and _number(gpus) != count:
        raise SettingError(f"--gpus {gpus}, but a launcher started {count} processes; leave it out")
    for is_asked, option, name in (
        (fsdp, "--fsdp", "ACCELERATE_USE_FSDP"),
        (zero is not None, f"--zero {zero}", "ACCELERATE_USE_DEEPSPEED"),
    ):
        if is_asked and os.environ.get(name) != "true":
            raise SettingError(
                f"{option} must be said to the launcher that started these processes, or leave the "
                "launcher out"
            )
