"""Tiny models and data that the tests share. Nothing here needs a network."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from torch import nn

import lorakin as lk
from lorakin.family import FAMILY, Method, member_named, method_named


def pytest_collection_finish() -> None:
    """Hides what was imported from the garbage collector: a Trainer collects each time."""
    gc.collect()
    gc.freeze()


LONGEST = ("tests/ui/test_page.py", "tests/test_gpu.py", "tests/training/test_processes.py")
"""Files whose tests take the longest: of several processes, one would end with them alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the longest tests."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


WORDS = (
    "the a cat dog bird sat ran flew on over mat tree fast slow yes no good bad what is who did it "
    "one two three"
).split()
TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <|end|> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_llama(tied: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A Llama with two layers and hidden size 32, random but always the same."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes}))
        .to(dtype)
        .eval()
    )


def small(words: str, **settings: Any) -> Any:
    """The members of `words`, such as `dora,vera`, with their small settings, and `settings`."""
    kinds = [member_named(word) for word in words.split(",")]
    pair = type(Method.of([kind() for kind in kinds]).parametrisation)
    declared = {
        name: value for kind in (pair, *kinds) for name, value in kind.test_settings.items()
    }
    members = method_named(words, declared | settings).members
    return members[0] if len(members) == 1 else list(members)


STARTS = [member.word for member in FAMILY if "start" in member.decides]
"""Members that say where the pair begins; some need a probe, and none adapts embeddings."""
MEMBERS: dict[str, Callable[[], Any]] = {
    member.word: functools.partial(small, member.word)
    for member in FAMILY
    if member.word not in STARTS
}
"""All other members, for runs of six steps or more; LoRA-drop wants a probe."""


def tiny_gpt2(layers: int = 2) -> Any:
    """A GPT-2, whose linear layers are Conv1D."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, pad_token_id=0
        )
    ).eval()


def tiny_mixtral(kernel: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A Mixtral whose four experts are parameters (experts, outputs, inputs).

    `kernel` is transformers' word for what runs them.
    """
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).to(dtype).eval()
    model.set_experts_implementation(kernel)
    return model


def tiny_gpt_oss(kernel: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-OSS, whose experts are (experts, inputs, outputs) and have biases."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.to(dtype).set_experts_implementation(kernel)
    return model


def tiny_llama4() -> Any:
    """A Llama 4, whose experts multiply all at once and do not say how they are laid out."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def tiny_bert(labels: int = 2) -> Any:
    """A BERT classifier whose head looks trained: its bias is not zero."""
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            num_labels=labels,
        )
    ).eval()
    nn.init.normal_(model.classifier.bias, std=0.02)
    return model


def interruptible() -> None:
    """For a child process: take SIGINT, which a shell's background jobs inherit as ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, and a linear head."""

    def __init__(self, padding_mode: str = "circular") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(
            4, 6, (3, 2), stride=(2, 1), padding=1, bias=False, padding_mode=padding_mode
        )
        self.three = nn.Conv3d(1, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        x = self.two(x.unsqueeze(-1).expand(-1, -1, -1, 5))
        x = x + self.three(x.unsqueeze(1)).mean()
        return self.head(x.mean((2, 3)))


def randomise(adapter: lk.Adapter, scale: float = 0.1, seed: int = 1) -> lk.Adapter:
    """Give every tensor of the adapter random values, as training might have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return adapter


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A word-level tokenizer with a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    specials = ["<pad>", "<|end|>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    raw = Tokenizer(
        WordLevel({word: number for number, word in enumerate(specials + WORDS)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=specials[3:],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A tiny causal language model with its tokenizer, as a local directory."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(pad_token_id=0, eos_token_id=1, initializer_range=0.3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> str:
    """A tiny encoder without a head, with its tokenizer, as a local directory."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert().bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL and give the path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def chat_rows() -> list[dict[str, str]]:
    """Questions that a tiny model can learn: the answer repeats the animal and says where it is."""
    animals, places = ("cat", "dog", "bird"), ("mat", "tree")
    return [
        {
            "prompt": f"what did the {animal} {verb}",
            "completion": f"the {animal} {verb} on the {place}",
        }
        for animal in animals
        for verb in ("sat", "ran", "flew")
        for place in places
        for _ in range(2)
    ]
