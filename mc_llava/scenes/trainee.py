"""
What `tiny`'s language model is while it learns: the model over cached features, and the auxiliary losses.

Answers alone teach it slowly. The scene generator knows more: which crops contain what a question names, and what each
crop shows. So two losses are added to that on the answers, on what the layers read before the head that answers:

    <image> tokens              question                       answer
    [whole] [1] [2] ... [31]    What does the red sign say?    It says 48H7.
                 ^                              |               |  |  |
                 +-----------------------------+---------------+--+--+    `looking_loss`: attention goes there
                 |
              "red: 48H7; star: blue"                                     `reading_loss`: the token says so
"""

import torch
from torch import nn
from transformers import Trainer

from .. import MCLlavaConfig, MCLlavaForConditionalGeneration, MCLlavaModel
from .conversations import ANSWERING_LAYER, LOOKING_HEADS, NAMING_LAYER, READ
from .tower import crop_loss, crop_targets, num_logits, split_logits


PLACE_WEIGHT = 4.0  # two places can be compared once each can be read off its name
READING_WEIGHT = 0.5


class CachedTower(MCLlavaModel):
    """Takes cached features of the frozen tower in place of pixels: right-aligned, [crops, longest, width]."""

    def encode_crops(self, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        return pixel_values

    def get_image_features(self, *fields, output_hidden_states=None, output_attentions=None, **kwargs):
        # Those of the language model are wanted where the losses ask for them: no tower is here.
        return super().get_image_features(*fields, **kwargs)


class LanguageModelTrainee(MCLlavaForConditionalGeneration):
    """
    The same parameters as the model's own, over a `CachedTower`, and a linear head for `reading_loss` that is dropped
    afterwards.

    Args:
        objects: the names of all cut-out objects.
    """

    _auto_class = None  # its checkpoints are only for resuming: no code is saved with them

    def __init__(self, config: MCLlavaConfig, objects: tuple[str, ...] = ()):
        super().__init__(config)
        self.model = CachedTower(config)
        targets = crop_targets(objects)
        self.targets = {name: targets[name] for name in READ}
        self.reading_head = nn.Linear(config.text_config.hidden_size, sum(num_logits(self.targets)))

    def begin_with(self, model: MCLlavaForConditionalGeneration):
        """Copy a model's parameters; the head keeps its own."""
        self.load_state_dict(self.state_dict() | model.state_dict())

    def give_to(self, model: MCLlavaForConditionalGeneration):
        """Copy the parameters to a model."""
        learned = self.state_dict()
        model.load_state_dict({name: learned[name] for name in model.state_dict()})


class SceneTrainer(Trainer):
    """Adds `looking_loss` and `reading_loss` to the loss on the answers."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        looks, readings = inputs.pop("looks"), inputs.pop("readings")
        inputs |= {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        trainee = self.accelerator.unwrap_model(model)
        layers = trainee.model.language_model.layers
        loss = loss + looking_loss(layers, outputs.attentions, outputs.hidden_states, **looks)
        loss = loss + READING_WEIGHT * reading_loss(trainee, outputs.hidden_states, **readings)
        return (loss, outputs) if return_outputs else loss


def looking_loss(
    decoder_layers: torch.nn.ModuleList,
    attentions: tuple[torch.Tensor, ...],
    hidden_states: tuple[torch.Tensor, ...],
    layers: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
) -> torch.Tensor:
    """
    How little the heads look where they should: -log of the attention's share there. And how far the first two numbers
    that the next layers read, behind a thing's name, are from the thing's place.

    Args:
        attentions, hidden_states: the language model's, as transformers returns them.
        layers, rows, positions: int[looks], from where to look.
        targets: bool[looks, length], the positions to look at.
        places: float[looks, 2], of the thing there, (x / width, y / height).
    """
    losses = []
    for layer, heads in LOOKING_HEADS.items():
        here = layers == layer
        weights = attentions[layer][rows[here], :heads, positions[here]].float()
        share = (weights * targets[here, None]).sum(-1)
        losses.append(-(share + 1e-6).log().sum() / max(1, share.numel()))
    here = layers == NAMING_LAYER
    for layer in range(NAMING_LAYER + 1, len(decoder_layers)):
        read = decoder_layers[layer].input_layernorm(hidden_states[layer][rows[here], positions[here]])
        distance = (read[:, :2].float() - places[here]).abs()
        losses.append(PLACE_WEIGHT * distance.sum() / max(1, distance.numel()))
    return sum(losses)


def reading_loss(
    trainee: LanguageModelTrainee,
    hidden_states: tuple[torch.Tensor, ...],
    rows: torch.Tensor,
    positions: torch.Tensor,
    **labels: torch.Tensor,
) -> torch.Tensor:
    """
    How badly the head tells what a crop shows from what the answering layer's heads read of its last token.

    Without it the projector hides what the tower had gathered: a linear head on the tower's token read 69 % of the
    signs of crops that it was not fitted to, one on what the answering layer reads 49 %.

    Args:
        rows, positions: int[crops], of the crops' last tokens.
        labels: those in `READ`, int[crops, ...].
    """
    norm = trainee.model.language_model.layers[ANSWERING_LAYER].input_layernorm
    read = norm(hidden_states[ANSWERING_LAYER][rows, positions])
    return crop_loss(split_logits(trainee.reading_head(read), trainee.targets), labels, trainee.targets)
