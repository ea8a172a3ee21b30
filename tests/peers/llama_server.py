"""llama.cpp's own server, from the package xllamacpp, with the options of `llama-server` that lorakin writes.

The package holds the server without its command; read here is what the command would read. Sums are in float32: no flash
attention, a float32 KV cache.
"""

from __future__ import annotations

import argparse
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def available() -> str | None:
    """Why the server cannot run here, or None if it can."""
    return None if find_spec("xllamacpp") else "llama.cpp's server needs: pip install xllamacpp"


def put_into(folder: Path) -> None:
    """Put a program `llama-server` into a folder."""
    program = folder / "llama-server"
    program.write_text(
        f"#!{sys.executable}\nimport runpy\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    program.chmod(0o755)


def serve() -> None:
    """Serve until a signal comes."""
    import xllamacpp

    options = argparse.ArgumentParser(allow_abbrev=False)
    options.add_argument("--model", required=True)
    options.add_argument("--alias")
    options.add_argument("--lora", default="")
    options.add_argument("--lora-scaled", default="")
    options.add_argument("--no-cache-prompt", dest="cache_prompt", action="store_false")
    options.add_argument("--chat-template-file", type=Path)
    options.add_argument("--jinja", action="store_true")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8080)
    given = options.parse_args()

    parameters = xllamacpp.CommonParams()
    parameters.model.path = given.model
    parameters.model_alias = {given.alias} if given.alias else set()
    scaled = [(path, 1.0) for path in given.lora.split(",") if path]
    for part in filter(None, given.lora_scaled.split(",")):
        path, _, scale = part.partition(":")
        scaled.append((path, float(scale)))
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(*pair) for pair in scaled]
    parameters.cache_prompt = given.cache_prompt
    parameters.use_jinja = given.jinja
    if given.chat_template_file:
        parameters.chat_template = given.chat_template_file.read_text()
    parameters.hostnames, parameters.port = [given.host], given.port
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.fit_params = False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    server = xllamacpp.Server(parameters)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    del server


if __name__ == "__main__":
    serve()
