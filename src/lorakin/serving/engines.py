"""The programs that serve a model, and what each cannot serve, with the reason.

A new engine is one entry in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lorakin.serving import engine_commands as commands
from lorakin.serving.engine import ADAPTER, MERGED, Engine, Limit
from lorakin.serving.engine_commands import VLLM_RANKS
from lorakin.serving.targets import GGUFAdapter, GGUFModel, MergedModel, PlainLoRA

# What several engines cannot serve.

NO_EQUAL = "a gain (DoRA) has no exact plain LoRA"
WHOLE = "PEFT's modules_to_save (a head, an embedding) are not read beside a base"
ROWS = "trained token rows are not read beside a base"
BIASES = "trained biases are not read beside a base"
OTHER_LAYERS = "only adapters of linear layers are read beside a base"
BESIDE_BASE = (
    Limit(lambda traits: traits.has_gain, NO_EQUAL),
    Limit(lambda traits: bool(traits.whole_modules), WHOLE),
    Limit(lambda traits: bool(traits.tokens), ROWS),
    Limit(lambda traits: traits.has_biases, BIASES),
    Limit(lambda traits: bool(traits.other_layers), OTHER_LAYERS),
)
ALL = (ADAPTER, MERGED)
TWO_STACKS = Limit(
    lambda traits: traits.is_encoder_decoder, "it serves no encoder-decoder (T5, BART)", ALL
)
ANSWERS_ONLY = Limit(
    lambda traits: not traits.generates, "it serves models that generate text, no heads", ALL
)
NO_GGUF = Limit(
    lambda traits: not traits.has_gguf_base,
    "lorakin writes whole GGUF models of Llama, Mistral, Qwen2 and Qwen3 only",
    ALL,
)

ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            {ADAPTER: PlainLoRA.name, MERGED: MergedModel.name},
            port=8000,
            limits=(
                *BESIDE_BASE,
                Limit(
                    lambda traits: traits.rank > VLLM_RANKS[-1],
                    f"--max-lora-rank is {VLLM_RANKS[-1]} at most",
                ),
                TWO_STACKS,
            ),
            several=(ADAPTER,),
            command=commands.vllm,
            asking=commands.named,
            program="vllm",
            install="pip install vllm (Linux, a GPU)",
        ),
        Engine(
            "sglang",
            {ADAPTER: PlainLoRA.name, MERGED: MergedModel.name},
            port=30000,
            limits=(*BESIDE_BASE, TWO_STACKS, ANSWERS_ONLY),
            several=(ADAPTER,),
            command=commands.sglang,
            asking=commands.after_base,
            program="python -m sglang.launch_server",
            modules=("sglang",),
            install="pip install sglang (Linux, a GPU)",
        ),
        Engine(
            "tgi",
            {ADAPTER: PlainLoRA.name, MERGED: MergedModel.name},
            port=3000,
            limits=(
                *BESIDE_BASE,
                Limit(
                    lambda traits: traits.template is not None,
                    "it reads chat templates from the base alone, and this adapter has its own",
                ),
                TWO_STACKS,
                ANSWERS_ONLY,
            ),
            several=(ADAPTER,),
            command=commands.tgi,
            asking=commands.by_adapter_id,
            program="text-generation-launcher",
            install="its container, ghcr.io/huggingface/text-generation-inference",
        ),
        Engine(
            "llama.cpp",
            {ADAPTER: GGUFAdapter.name, MERGED: GGUFModel.name},
            port=8080,
            limits=(*BESIDE_BASE, NO_GGUF, ANSWERS_ONLY),
            several=(ADAPTER,),
            command=commands.llama_cpp,
            asking=commands.by_scale,
            program="llama-server",
            install="a release of llama.cpp (github.com/ggml-org/llama.cpp), or brew install "
            "llama.cpp",
        ),
        Engine(
            "ollama",
            {MERGED: GGUFModel.name},
            port=11434,
            limits=(
                Limit(lambda traits: True, "since 0.34.1 it makes no model of an adapter"),
                NO_GGUF,
                ANSWERS_ONLY,
            ),
            several=(MERGED,),
            command=lambda launch: ["serve"],
            asking=commands.named,
            program="ollama",
            install="its installer, ollama.com/download",
            afterwards=commands.ollama_models,
            environment=lambda launch: {"OLLAMA_HOST": f"{launch.host}:{launch.port}"},
        ),
        Engine(
            "transformers",
            {MERGED: MergedModel.name},
            port=8000,
            limits=(
                Limit(
                    lambda traits: True,
                    "it wants a config and a tokenizer in each model's directory",
                ),
                TWO_STACKS,
                ANSWERS_ONLY,
            ),
            several=(MERGED,),
            command=commands.transformers,
            asking=commands.by_path,
            program="transformers",
            modules=("transformers", "fastapi", "uvicorn", "openai"),
            install="pip install 'lorakin[serve]'",
        ),
    )
}
