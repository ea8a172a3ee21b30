"""The engines' commands, and how a request to each names a model."""

from __future__ import annotations

from collections.abc import Mapping

from lorakin.serving.engine import ADAPTER, BASE, MERGED, Launch

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank, from a portable adapter's smallest rank on."""


def _pairs(names: Mapping[str, str]) -> list[str]:
    return [f"{name}={path}" for name, path in names.items()]


def vllm(launch: Launch) -> list[str]:
    rest = ["--host", launch.host, "--port", str(launch.port)]
    if launch.way == MERGED:
        return ["serve", *launch.models.values(), "--served-model-name", launch.only, *rest]
    rank = next((rank for rank in VLLM_RANKS if rank >= launch.rank), VLLM_RANKS[-1])
    template = ["--chat-template", launch.template] if launch.template else []
    return [
        "serve", str(launch.base), "--served-model-name", BASE, "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", str(len(launch.models)),
        "--lora-modules", *_pairs(launch.models), *template, *rest,
    ]  # fmt: skip


def sglang(launch: Launch) -> list[str]:
    rest = ["--host", launch.host, "--port", str(launch.port)]
    if launch.way == MERGED:
        return ["--model-path", *launch.models.values(), "--served-model-name", launch.only, *rest]
    template = ["--chat-template", launch.template] if launch.template else []
    # A slot more than adapters: requests to the base take one too.
    return [
        "--model-path", str(launch.base), "--served-model-name", BASE, "--enable-lora",
        "--lora-paths", *_pairs(launch.models),
        "--max-loras-per-batch", str(len(launch.models) + 1), *template, *rest,
    ]  # fmt: skip


def tgi(launch: Launch) -> list[str]:
    rest = ["--hostname", launch.host, "--port", str(launch.port)]
    if launch.way == MERGED:
        return ["--model-id", *launch.models.values(), *rest]
    return [
        "--model-id", str(launch.base), "--lora-adapters", ",".join(_pairs(launch.models)), *rest,
    ]  # fmt: skip


def llama_cpp(launch: Launch) -> list[str]:
    rest = ["--jinja", "--host", launch.host, "--port", str(launch.port)]
    if launch.way == MERGED:
        return [
            "--model",
            f"{launch.models[launch.only]}/model.gguf",
            "--alias",
            launch.only,
            *rest,
        ]
    files = [f"{path}/adapter.gguf" for path in launch.models.values()]
    # One option with commas: of a repeated one llama.cpp takes the last. Several are off, so that
    # a request which names none gets the base; --lora-init-without-apply would apply all to it.
    # And such a request would go on from a cached prompt that another adapter has read.
    alone = len(files) == 1
    off = ["--lora-scaled", ",".join(f"{file}:0" for file in files), "--no-cache-prompt"]
    loras = ["--lora", *files] if alone else off
    template = ["--chat-template-file", launch.template] if launch.template else []
    name = launch.only if alone else BASE
    return ["--model", str(launch.base), "--alias", name, *loras, *template, *rest]


def transformers(launch: Launch) -> list[str]:
    return ["serve", "--host", launch.host, "--port", str(launch.port)]


def ollama_models(launch: Launch) -> list[list[str]]:
    return [
        ["ollama", "create", name, "-f", f"{path}/Modelfile"]
        for name, path in launch.models.items()
    ]


def named(launch: Launch) -> str:
    names = [*launch.models, *([BASE] if launch.way == ADAPTER else [])]
    return "model: " + ", ".join(f'"{name}"' for name in names)


def after_base(launch: Launch) -> str:
    if launch.way == MERGED:
        return named(launch)
    return "model: " + ", ".join([f'"{BASE}:{name}"' for name in launch.models] + [f'"{BASE}"'])


def by_adapter_id(launch: Launch) -> str:
    if launch.way == MERGED:
        return f"{launch.only} answers, whatever a request names"
    names = ", ".join(f'"{name}"' for name in launch.models)
    return f"model (in /generate: adapter_id): {names}; anything else is the base"


def by_scale(launch: Launch) -> str:
    if launch.way == MERGED or len(launch.models) == 1:
        return f"{launch.only} answers, whatever a request names"
    scales = [
        f'{name}: "lora": [{{"id": {number}, "scale": 1}}]'
        for number, name in enumerate(launch.models)
    ]
    return "; ".join([*scales, f'{BASE}: no "lora"'])


def by_path(launch: Launch) -> str:
    names = ", ".join(f'"{path}"' for path in [*launch.models.values(), str(launch.base)])
    return f"model: {names}; each is loaded when it is first asked for, with a base of its own"
