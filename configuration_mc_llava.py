"""Configuration of MC-LLaVA: a SigLIP vision tower, a coordinate embedding, a projector and a Phi language model."""

import copy
import math
import sys
from importlib import import_module

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


# SigLIP so400m, patch 14 at 384 x 384.
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}

# Phi-2. Spelled out where `PhiConfig` has a different default: the rotary factor, and ids that the outer config owns.
PHI_2 = {
    "model_type": "phi",
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "partial_rotary_factor": 0.4,
    "resid_pdrop": 0.1,
    "vocab_size": 51200,
}

# Far above those of any model of these kinds. Larger values, from a damaged or hostile file, would exhaust the memory
# or take days.
LIMITS = {
    "hidden_size": 2**17,
    "image_size": 2**14,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**24,
    "num_attention_heads": 2**12,
    "num_channels": 3,
    "num_hidden_layers": 1000,
    "num_key_value_heads": 2**12,
    "patch_size": 2**14,
    "vocab_size": 2**24,
}

GENERATION_CLASS = "modeling_mc_llava.MCLlavaForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_mc_llava.MCLlavaConfig",
    "AutoModel": "modeling_mc_llava.MCLlavaAutoModel",
    "AutoModelForCausalLM": GENERATION_CLASS,
    "AutoModelForImageTextToText": GENERATION_CLASS,
    "AutoModelForMultimodalLM": GENERATION_CLASS,
}


def add_to_package(name: str):
    """
    Make a module of this code an attribute of its package, as Python's own import does.

    transformers puts the file of a class that it loads from a folder into `sys.modules` alone. dill, by which
    `datasets` hashes and sends functions, looks the class up in the package, and copies all of it if it is not there.
    """
    package, _, module = name.rpartition(".")
    if package:
        setattr(import_module(package), module, sys.modules[name])


def without_kernels(config: dict) -> dict:
    """A saved configuration without the names of code that computes attention or experts."""
    return {
        name: value
        for name, value in config.items()
        if not name.removesuffix("_internal").endswith("_implementation") and "kernel" not in name
    }


class WrongValueError(ValueError):
    """A value that no configuration may have. In a file, it is a sign of damage."""


def check_values(name: str, config: PreTrainedConfig):
    """Raise an error for a size below 1 or above its limit, and for numbers that make all answers garbage."""
    rope = getattr(config, "rope_parameters", None) or {}
    for key, value in {"layer_norm_eps": config.layer_norm_eps, "rope_theta": rope.get("rope_theta", 1.0)}.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise WrongValueError(f"{key} of {name} must be above 0 and finite, got {value!r:.100}")
    check_activation(name, config.hidden_act)
    for key, limit in LIMITS.items():
        size = getattr(config, key, None)
        if size is not None and not (isinstance(size, int) and 1 <= size <= limit):
            raise WrongValueError(f"{key} of {name} must be from 1 to {limit}, got {size!r:.100}")


def check_activation(name: str, activation):
    if not isinstance(activation, str) or activation not in ACT2FN:
        raise WrongValueError(
            f"the activation of {name}, {activation!r:.100}, is unknown: choose from transformers.activations.ACT2FN"
        )


@strict
class MCLlavaConfig(PreTrainedConfig):
    r"""
    Configuration of `MCLlavaForConditionalGeneration`; by default that of the published 3B model.

    Args:
        vision_config (`dict` or `SiglipVisionConfig`, *optional*): the vision tower; SigLIP so400m by default. Its
            pooling head is never built: the model reads patch tokens.
        text_config (`dict` or `PhiConfig`, *optional*): the language model; Phi-2 by default.
        image_token_index (`int`, defaults to 50297): id of `<image>`; also readable as `image_token_id`.
        projector_hidden_act (`str`, defaults to `"gelu"`): activation between the projector's two layers.
        zoom_heads (`list[dict]`, *optional*): the attention heads that find what a question asks about, each with
            `layer` and `head`, counted from 0, and how often it did when it was measured (`rate` with its
            interval, `low` to `high`, out of `questions`, and `chance`). `mc-llava zoom-heads` writes them.
        eos_token_id, pad_token_id, bos_token_id (`int`): ids of `<|im_end|>`, `<pad>` and `<|endoftext|>`. They are
            kept here because the published `generation_config.json` names none.

    The published configuration can be loaded unchanged. Its keys `ignore_index` and outer `vocab_size` are dropped,
    because the loss function and `text_config` own them.

    A loaded file does not choose how attention is computed: transformers would fetch and run a kernel that it names.
    `from_pretrained(..., attn_implementation=...)` does.

    Raises:
        ValueError: if `projector_tokens_num`, another key of the published configuration, is not 1 (no other projector
            was ever published), if the word embeddings are to be tied, if a sub-configuration is of another model than
            SigLIP or Phi, or if one of its sizes is below 1 or above `LIMITS`, or a number makes no sense.

    ```python
    >>> MCLlavaConfig().text_config.hidden_size
    2560
    ```"""

    model_type = "mc-llava"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # What a Trainer leaves out of its predictions: it can't concatenate image outputs, which batches of text lack.
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_outputs"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_index: int = 50297
    projector_hidden_act: str = "gelu"
    zoom_heads: list[dict] | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50295
    pad_token_id: int | None = 50298

    def __post_init__(self, **kwargs):
        self.vision_config = copy.copy(self._sub_config(self.vision_config, SIGLIP_SO400M))  # not the caller's
        self.text_config = self._sub_config(self.text_config, PHI_2)
        check_values("vision_config", self.vision_config)
        check_values("text_config", self.text_config)
        check_activation("the projector", self.projector_hidden_act)
        self.vision_config.vision_use_head = False

        projector_tokens_num = kwargs.pop("projector_tokens_num", 1)
        if projector_tokens_num != 1:
            raise ValueError(f"projector_tokens_num must be 1, got {projector_tokens_num}: use a checkpoint with 1.")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings must be False, Phi's output layer has its own weights: leave it out")
        for entry in self.zoom_heads or ():
            limits = {"layer": self.text_config.num_hidden_layers, "head": self.text_config.num_attention_heads}
            for name, limit in limits.items():
                if type(entry.get(name)) is not int or not 0 <= entry[name] < limit:
                    raise ValueError(f"zoom_heads must have a {name} from 0 to {limit - 1}, got {entry}: measure them")
        kwargs.pop("ignore_index", None)
        kwargs.pop("vocab_size", None)

        # The published map names files that no longer exist. A map to our files, in whatever repository, is kept.
        auto_map = kwargs.pop("auto_map", None) or {}
        if not isinstance(auto_map, dict):
            raise WrongValueError(f"auto_map must be a dict of class names, got {auto_map!r:.100}")
        if not str(auto_map.get("AutoConfig", "")).endswith(AUTO_MAP["AutoConfig"]):
            auto_map = AUTO_MAP
        self.auto_map = dict(auto_map)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        if not isinstance(config_dict, dict):
            raise ValueError(f"config.json must be an object, got {config_dict!r:.100}: fetch it again")
        config_dict = without_kernels(config_dict)
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"model_type must be {cls.model_type}, got {config_dict['model_type']!r:.100}: use another checkpoint"
            )
        for name in cls.sub_configs:
            if isinstance(config_dict.get(name), dict):
                config_dict[name] = without_kernels(config_dict[name])
        try:
            return super().from_dict(config_dict, **kwargs)
        # AttributeError and TypeError come from a value of the wrong type or an unknown dtype.
        except (WrongValueError, StrictDataclassError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config.json has a wrong value ({reason}): fetch it again") from error

    @staticmethod
    def _sub_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
        is_built = isinstance(config, PreTrainedConfig)
        model_type = config.model_type if is_built else (config or default).get("model_type", default["model_type"])
        if model_type != default["model_type"]:
            raise ValueError(
                f"model_type must be {default['model_type']}, got {model_type!r:.100}: use another checkpoint"
            )
        if is_built:
            return config
        config = dict(default if config is None else config)
        config.pop("auto_map", None)  # the published text_config points to code in a third repository
        # Newer releases save the factor in here. transformers 5.19 would add PhiConfig's default of 0.5 to it.
        rope_parameters = config.get("rope_parameters") or {}
        if "partial_rotary_factor" in rope_parameters:
            config.setdefault("partial_rotary_factor", rope_parameters["partial_rotary_factor"])
        return CONFIG_MAPPING[config.pop("model_type", default["model_type"])](**config)


MCLlavaConfig.register_for_auto_class()

# Pipelines and `transformers serve` look the class up by name, and the configuration is the first file they load.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names[MCLlavaConfig.model_type] = GENERATION_CLASS.rpartition(".")[2]

add_to_package(__name__)

__all__ = ["MCLlavaConfig", "add_to_package"]
