"""One of two processes of tests/training/test_processes.py: trains members on bases under one
engine, and saves what came out.

torchrun --nproc_per_node 2 tests/training/worker.py ENGINE FOLDER MEMBER:BASE …
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import lorakin as lk
from conftest import MEMBERS, tiny_llama, tiny_mixtral
from lorakin.family.sharding import is_sharded
from lorakin.training import prepare_trainer
from lorakin.training.precision import QUANTISATIONS

STEPS, ROWS, GLOBAL_BATCH = 8, 64, 8

BASES = ["plain", "experts", *QUANTISATIONS]
EXPERTS = ["q_proj", "gate_up_proj", "down_proj"]


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(3, 64, (9,), generator=generator) for _ in range(ROWS)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def load(base: str, folder: Path) -> Any:
    """The tiny Llama, plain or quantised, or a tiny Mixtral."""
    if base == "experts":
        return tiny_mixtral("grouped_mm")
    if base == "plain":
        return tiny_llama(hidden_size=64, intermediate_size=128)
    _, config = QUANTISATIONS[base]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "plain", dtype=torch.float32, quantization_config=config(torch.float32, None)
    )


def options(engine: str, model: Any) -> dict[str, Any]:
    """What the Trainer is told of an engine."""
    if engine == "fsdp2":
        block = type(model.model.layers[0]).__name__
        return {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [block]},
        }
    if not engine.startswith("zero"):
        return {}
    batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {
        "stage": int(engine[-1]),
        "stage3_param_persistence_threshold": 1,
    }  # so that all of the base is cut
    config = {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed": config | dict.fromkeys(batches, "auto")}


def train(member: str, base: str, engine: str, folder: Path) -> None:
    """Train, and save the losses and the adapter at `folder`/`engine`-`member`-`base`."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model, data = load(base, folder), rows()
    probe = (
        [{key: torch.stack([row[key] for row in data[:4]]) for key in data[0]}]
        if member == "lora-drop"
        else None
    )
    adapter = lk.adapt(
        model,
        MEMBERS[member](),
        EXPERTS if base == "experts" else "all-linear",
        seed=0,
        probe=probe,
    )
    place = folder / f"{engine}-{member}-{base}"
    sgd = (
        member == "vera"
    )  # whose gradients are so small that Adam would make their last digits into steps
    args = transformers.TrainingArguments(
        str(place / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        logging_steps=1,
        learning_rate=0.5 if sgd else 5e-3,
        optim="sgd" if sgd else "adamw_torch",
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        data_seed=0,
        **options(engine, model),
    )
    trainer = transformers.Trainer(model, args, train_dataset=data)  # type: ignore[arg-type]
    if engine == "fsdp2":  # Accelerate chooses it for GPUs alone; the rest of its path is the same
        state = trainer.accelerator.state
        state.distributed_type = DistributedType.FSDP
        vars(state)["fsdp_plugin"] = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        trainer.is_fsdp_enabled = True
    trainer.remove_callback(transformers.PrinterCallback)
    half = place / "checkpoints" / "checkpoint-4"
    resume = os.environ.get("LORAKIN_RESUME")
    prepare_trainer(trainer).train(resume_from_checkpoint=str(half) if resume else None)
    wrapped = type(trainer.model_wrapped).__name__
    assert {"one": type(model).__name__, "ddp": "DistributedData", "fsdp2": "FSDP"}.get(
        engine, "DeepSpeed"
    ) in wrapped
    assert not any(is_sharded(p) for p in adapter.parameters())
    assert is_sharded(model.model.embed_tokens.weight) == (engine in ("fsdp2", "zero3"))
    for name, parameter in adapter.named_parameters():
        assert_same_everywhere(name, parameter.detach(), world)
    if int(os.environ.get("RANK", "0")) == 0:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (place / "losses.json").write_text(json.dumps(losses))
        adapter.save(place / "adapter")


def assert_same_everywhere(name: str, tensor: torch.Tensor, world: int) -> None:
    if world > 1:
        both = [torch.empty_like(tensor) for _ in range(world)]
        torch.distributed.all_gather(both, tensor.contiguous())
        assert all(torch.equal(tensor, other) for other in both), (
            f"{name} differs between the processes"
        )


if __name__ == "__main__":
    engine, folder, *cells = sys.argv[1:]
    for cell in cells:
        train(*cell.split(":"), engine, Path(folder))
