"""Inputs for any of the sweep's models, made for the names that its forward takes; with labels where it has a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from sweep.shrink import FRAMES, IMAGE, WORDS

LENGTH = 12
GRID = 4
"""Patches along each side of an image that is given as patches."""


def setting(model: Any, *names: str, default: Any = None) -> Any:
    """The first of these fields that the model's config or one nested in it has."""
    for config in _configs(model.config):
        for name in names:
            if getattr(config, name, None) is not None:
                return getattr(config, name)
    return default


def _configs(config: Any) -> list[Any]:
    inner = [
        value for value in vars(config).values() if isinstance(value, transformers.PreTrainedConfig)
    ]
    return [config, *(deeper for one in inner for deeper in _configs(one))]


def ids(model: Any) -> Tensor:
    """Ordinary tokens (2, LENGTH), none of them special."""
    return torch.randint(5, 60, (2, LENGTH))


def size(model: Any) -> tuple[int, int]:
    """Height and width of the model's images."""
    given = setting(model, "image_size", "img_size", "input_size", default=IMAGE)
    return (
        (given["height"], given["width"])
        if isinstance(given, Mapping)
        else tuple(given)
        if isinstance(given, list | tuple)
        else (given,) * 2
    )


def images(model: Any) -> Tensor:
    return torch.randn(
        2, setting(model, "num_channels", "in_channels", "in_chans", default=3), *size(model)
    )


def patches(model: Any) -> Tensor:
    """Images as rows of patches, as Qwen's vision towers take them: (images × patches, values of a patch)."""
    channels = setting(model, "in_channels", "in_chans", "num_channels", default=3)
    side, frames = setting(model, "patch_size"), setting(model, "temporal_patch_size", default=1)
    return torch.randn(2 * GRID**2, channels * frames * side**2)


def spectrum(model: Any) -> Tensor:
    bands = setting(
        model,
        "num_mel_bins",
        "input_feat_per_channel",
        "n_mels",
        "num_mels",
        "feature_size",
        default=16,
    )
    return torch.randn(2, bands, FRAMES)


def videos(model: Any) -> Tensor:
    return torch.randn(
        2, setting(model, "num_frames", "frames_per_clip", default=2), 3, *size(model)
    )


INPUTS: dict[str, Callable[[Any], Any]] = {
    "input_ids": ids,
    "decoder_input_ids": ids,
    "pixel_values": images,
    "pixel_values_videos": videos,
    "image_grid_thw": lambda model: torch.tensor([[1, GRID, GRID]] * 2),
    "image_sizes": lambda model: torch.tensor([list(size(model))] * 2),
    "input_features": spectrum,
    "input_features_mask": lambda model: torch.ones(2, FRAMES, dtype=torch.long),
    "feature_attention_mask": lambda model: torch.ones(2, FRAMES, dtype=torch.long),
    "input_values": lambda model: torch.randn(2, 1200),
    "bbox": lambda model: torch.tensor([1, 2, 5, 7]).repeat(2, LENGTH, 1),
    "visual_feats": lambda model: torch.randn(2, 4, model.config.visual_feat_dim),
    "visual_pos": lambda model: torch.rand(2, 4, 4),
    "visual_embeds": lambda model: torch.randn(2, 4, model.config.visual_embedding_dim),
    "visual_attention_mask": lambda model: torch.ones(2, 4),
    "global_attention_mask": lambda model: (torch.arange(LENGTH) < 2).long().repeat(2, 1),
    "past_values": lambda model: torch.randn(
        2, setting(model, "context_length") + max(setting(model, "lags_sequence"))
    ),
    "past_time_features": lambda model: torch.randn(
        2, setting(model, "context_length") + max(setting(model, "lags_sequence")), 1
    ),
    "past_observed_mask": lambda model: torch.ones(
        2, setting(model, "context_length") + max(setting(model, "lags_sequence"))
    ),
    "future_values": lambda model: torch.randn(2, setting(model, "prediction_length")),
    "future_time_features": lambda model: torch.randn(2, setting(model, "prediction_length"), 1),
    "states": lambda model: torch.randn(2, 5, model.config.state_dim),
    "actions": lambda model: torch.randn(2, 5, model.config.act_dim),
    "rewards": lambda model: torch.randn(2, 5, 1),
    "returns_to_go": lambda model: torch.randn(2, 5, 1),
    "timesteps": lambda model: torch.arange(5).repeat(2, 1),
    "flattened_patches": lambda model: torch.cat(
        [torch.arange(4.0).repeat(2, 1)[..., None]] * 2
        + [torch.randn(2, 4, setting(model, "patch_embed_hidden_size"))],
        -1,
    ),
    "qformer_input_ids": ids,
    "query_embeds": lambda model: torch.randn(2, 4, model.config.hidden_size),
    "state": lambda model: torch.randn(2, model.config.max_state_dim),
    "pixel_attention_mask": lambda model: torch.ones(2, GRID**2, dtype=torch.long),
    "spatial_shapes": lambda model: torch.tensor([[GRID, GRID]] * 2),
}
"""Argument of a forward → what to give for it."""

OFTEN = """image_grid_thw bbox visual_feats visual_pos visual_embeds visual_attention_mask global_attention_mask
    past_time_features past_observed_mask future_values future_time_features states actions rewards returns_to_go timesteps
    flattened_patches input_features_mask feature_attention_mask spatial_shapes pixel_values input_features
    input_ids""".split()
"""Optional arguments that are given wherever a forward has them."""


def boxes(model: Any) -> list[dict[str, Tensor]]:
    one = {
        "class_labels": torch.tensor([0, 1]),
        "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.4, 0.2, 0.3]]),
    }
    return [one, dict(one)]


LABELS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ForCausalLM LMHeadModel ForMaskedLM ForConditionalGeneration ForSpeechSeq2Seq ForPreTraining "
    "VisionEncoderDecoderModel EncoderDecoderModel WithLMHead": lambda model: {
        "labels": ids(model)
    },
    "ForSequenceClassification ForImageClassification ForAudioClassification ForVideoClassification": lambda model: {
        "labels": torch.tensor([0, 1])
    },
    "ForCTC": lambda model: {"labels": torch.tensor([[3, 4, 5], [6, 7, 7]])},
    "ForObjectDetection": lambda model: {"labels": boxes(model)},
    "DetrForSegmentation": lambda model: {
        "labels": [{**one, "masks": torch.ones(2, *size(model))} for one in boxes(model)]
    },
    "ForSemanticSegmentation": lambda model: {"labels": torch.randint(0, 2, (2, *size(model)))},
    "ForUniversalSegmentation ForInstanceSegmentation": lambda model: {
        "mask_labels": [(torch.rand(2, *size(model)) > 0.5).float() for _ in range(2)],
        "class_labels": [torch.tensor([0, 1]) for _ in range(2)],
    },
    "ForQuestionAnswering": lambda model: {
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    },
    "ForTokenClassification": lambda model: {"labels": torch.randint(0, 2, (2, LENGTH))},
}
"""Ends of a class's name → the labels for its loss."""

MODALITIES = (
    ("pixel_values", "get_image_features", ("image_token_id", "image_token_index")),
    ("input_features", "get_audio_features", ("audio_token_id", "audio_token_index")),
)
"""Features that stand in the text at tokens of their own: their argument, the method that makes them, the token's name."""


def made(model: Any, extra: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """The inputs for one forward, always the same. `extra` has what this model wants otherwise; None gives nothing."""
    torch.manual_seed(1)
    makers = {**INPUTS, **extra}
    takes = inspect.signature(model.forward).parameters
    wanted = [
        model.main_input_name,
        *(key for key, p in takes.items() if p.default is p.empty),
        *OFTEN,
        *extra,
    ]
    if model.config.is_encoder_decoder:
        wanted.append("decoder_input_ids")
    given = {
        key: makers[key](model) for key in dict.fromkeys(wanted) if key in takes and makers.get(key)
    }
    if "image_grid_thw" in given and "pixel_values" in given and "pixel_values" not in extra:
        given["pixel_values"] = patches(model)
    for ends, labels in LABELS.items():
        if type(model).__name__.endswith(tuple(ends.split())):
            given |= {
                key: value
                for key, value in labels(model).items()
                if key in takes and key not in extra
            }
    for modality in MODALITIES:
        _place(model, given, *modality)
    if (
        "mm_token_type_ids" in takes
        and "input_ids" in given
        and (image := setting(model, *MODALITIES[0][2])) is not None
    ):
        given["mm_token_type_ids"] = (given["input_ids"] == image).long()
    return given


def _place(
    model: Any, given: dict[str, Any], argument: str, method: str, tokens: tuple[str, ...]
) -> None:
    """Begin each text with as many tokens of a modality as the model makes features of it."""
    token, maker = (
        setting(model, *tokens),
        next((m for m in (model, getattr(model, "model", None)) if hasattr(m, method)), None),
    )
    if argument not in given or "input_ids" not in given or token is None or maker is None:
        return
    takes = inspect.signature(getattr(maker, method)).parameters
    with torch.no_grad():
        out = getattr(maker, method)(
            **{key: value for key, value in given.items() if key in takes or key == argument}
        )
    features = out if isinstance(out, Tensor | list | tuple) else out.pooler_output
    count = sum(one.shape[:-1].numel() for one in features) // 2
    given["input_ids"] = torch.cat([torch.full((2, count), token), given["input_ids"]], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if "labels" in given:
        given["labels"] = given["input_ids"].masked_fill(given["input_ids"] >= WORDS, -100)


def loss_of(out: Any) -> Tensor:
    """The model's own loss, else a weighted sum of squares of its first floating tensor.

    Weighted, since the plain sum of squares of what a layer norm gives is a constant.
    """
    own = getattr(out, "loss", None)
    if isinstance(own, Tensor):
        return own.sum()
    found = next(tensors(out), None)
    assert found is not None, f"no floating tensor in {type(out).__name__}"
    return (found.square().flatten() * torch.linspace(0.5, 1.5, found.numel())).sum()


def tensors(out: Any) -> Iterator[Tensor]:
    """Every floating tensor of an output, however deep."""
    if isinstance(out, Tensor) and out.is_floating_point():
        yield out
    elif isinstance(out, Mapping | list | tuple):
        for value in out.values() if isinstance(out, Mapping) else out:
            yield from tensors(value)
