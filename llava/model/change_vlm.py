"""ChangeVLM: vision tower, fusion, projector and language model as one transformers model.

Shapes: B samples, I images of a sample, M images of a batch, N tokens of an image, T text positions,
D tower width, H language model width, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from llava.errors import DataError
from llava.model import checkpoint
from llava.model.anyres import anyres_tile_count, arrange_anyres
from llava.model.configuration import ChangeVLMConfig
from llava.model.fusion import DifferenceFusion, build_fusion
from llava.model.fusion.difference import DifferenceBlock, sine_position_code
from llava.model.projector import Projector
from llava.model.splice import placeholder_mask, splice
from llava.model.vision_tower import VisionTower


@dataclass
class ImageFeatures(BaseModelOutputWithPooling):
    """`pooler_output`: features for the placeholders [n, H]; `change`: the change stream [pairs, N, D] or None."""

    change: Tensor | None = None


@dataclass
class ChangeVLMModelOutput(BaseModelOutputWithPast):
    """As for a language model, with `change` [pairs, N, D] when pairs were fused in this call."""

    change: Tensor | None = None


@dataclass
class ChangeVLMOutput(CausalLMOutputWithPast):
    """As for a causal language model, with `change` [pairs, N, D] when pairs were fused in this call."""

    change: Tensor | None = None


class ChangeVLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights shared by the model classes."""

    config_class = ChangeVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["DifferenceBlock", "SiglipEncoderLayer", "Qwen2DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Silent in transformers' report only: `checkpoint.inspect` has compared every key before.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"\.norm4\.",
        r"vision_resampler\.ChangeAwareTokenReduce\.",
        r"mm_cc_projector\.",
        r"vision_tower\.encoder\.",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for our own modules; tower and language model initialise themselves by their own rules.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, DifferenceBlock):
            for flag in (module.flag_before, module.flag_after, module.flag_change):
                init.normal_(flag, std=std)
        elif isinstance(module, DifferenceFusion):
            # not in any file: a model built on the meta device gets it here
            position = module.get_buffer("position")
            init.copy_(position, sine_position_code(module.grid, position.shape[-1]))
        elif isinstance(module, ChangeVLMModel) and module.image_newline is not None:
            init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any) -> Any:
        """Load ours or any released layout from a folder or hub id (see `llava.model.checkpoint`).

        Raises:
            CheckpointError: missing, unexpected or mis-shaped weights, all named.
        """
        if pretrained_model_name_or_path is not None:
            kwargs = checkpoint.prepare_loading(cls, pretrained_model_name_or_path, kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers, but always under our names: a model that was loaded with renamed keys would
        otherwise write the old ones, and the Trainer's plain `load_state_dict` would then match nothing."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)


class ChangeVLMModel(ChangeVLMPreTrainedModel):
    """Images and text to hidden states."""

    def __init__(self, config: ChangeVLMConfig) -> None:
        super().__init__(config)
        dim, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        layers = config.vision_layers if config.fusion is not None else config.vision_layers[-1:]
        self.vision_tower = VisionTower(config.vision_config, layers)
        self.fusion = build_fusion(config.fusion, dim=dim, grid=config.grid)
        self.projector = Projector(config.projector, dim, hidden)
        self.image_newline = nn.Parameter(torch.empty(hidden)) if config.image_newline else None
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: Tensor, image_counts: Tensor | None = None, image_sizes: Tensor | None = None
    ) -> ImageFeatures:
        """Images to what replaces their placeholders.

        Args:
            pixel_values: [B, I, C, S, S]; [B, C, S, S] is one image a sample. Samples with fewer than I images
                are padded behind. Where there is a fusion, samples of exactly two images are fused: (before, after).
            image_counts: [B], images of each sample; all I when absent.
            image_sizes: [B, 2] (height, width) of the original images: says that each sample is one image cut
                into `anyres` tiles, the whole image first; a sample given as (0, 0) is not cut.
        """
        if pixel_values.dim() == 4:
            pixel_values = pixel_values[:, None]
        batch, most = pixel_values.shape[:2]
        counts = [most] * batch if image_counts is None else image_counts.tolist()
        if image_sizes is not None:
            return self._anyres_features(pixel_values, counts, image_sizes)
        if counts == [most] * batch:
            images = pixel_values.flatten(0, 1)
        else:
            images = torch.cat([sample[:count] for sample, count in zip(pixel_values, counts, strict=True)])
        levels = self.vision_tower(images)  # L of [M, N, D]
        last, change = levels[-1], None
        if self.fusion is not None and 2 in counts:
            starts = [sum(counts[:b]) for b in range(batch) if counts[b] == 2]
            if len(starts) == batch:
                before, after = (torch.stack([x[i::2] for x in levels], dim=1) for i in (0, 1))  # [B, L, N, D]
                fused = self.fusion(before, after)
                last = torch.stack([fused.before, fused.after], dim=1).flatten(0, 1)
            else:
                rows = torch.tensor(starts, device=images.device)
                before, after = (torch.stack([x[rows + i] for x in levels], dim=1) for i in (0, 1))
                fused = self.fusion(before, after)
                last = last.index_copy(0, rows, fused.before).index_copy(0, rows + 1, fused.after)
            change = fused.change
        features = self.projector(last)  # [M, N, H]
        return ImageFeatures(last_hidden_state=last, pooler_output=features.flatten(0, 1), change=change)

    def _anyres_features(self, pixel_values: Tensor, counts: Sequence[int], image_sizes: Tensor) -> ImageFeatures:
        """Single images as tiles [B, T, C, S, S] to features [n, H], rows separated by the newline vector."""
        if self.image_newline is None:
            raise DataError("image_sizes were given, but this model has no image_newline: use aspect 'square' or 'pad'")
        config, sizes = self.config, [(int(h), int(w)) for h, w in image_sizes.tolist()]
        tiles = [
            anyres_tile_count(size, config.vision_config.image_size) if any(size) else count
            for size, count in zip(sizes, counts, strict=True)
        ]
        images = torch.cat([sample[:count] for sample, count in zip(pixel_values, tiles, strict=True)])
        last = self.vision_tower(images)[-1]
        parts = []
        for size, features in zip(sizes, self.projector(last).split(tiles), strict=True):  # [T, N, H]
            if any(size):
                features = arrange_anyres(
                    features, size, self.image_newline, image_size=config.vision_config.image_size, max_tiles=config.max_tiles
                )
            parts.append(features.reshape(-1, features.shape[-1]))
        return ImageFeatures(last_hidden_state=last, pooler_output=torch.cat(parts))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_sizes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """ids [B, T] with placeholders, and their images, to embeddings [B, T, H] and the change stream."""
        mask = placeholder_mask(input_ids, self.config.image_token_id)
        # the placeholder needs no row in the embedding: it is replaced, or nothing is there to replace it
        embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if pixel_values is None:
            return embeds, None
        images = self.get_image_features(pixel_values, image_counts, image_sizes)
        return splice(embeds, mask, images.pooler_output), images.change

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ChangeVLMModelOutput:
        """See `ChangeVLMForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        change = None
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds, change = self.embed(input_ids, pixel_values, image_counts, image_sizes)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids: inputs_embeds already hold the images (see `embed`)")
        kwargs["return_dict"] = True
        out = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return ChangeVLMModelOutput(**out, change=change)


class ChangeVLMForConditionalGeneration(ChangeVLMPreTrainedModel, GenerationMixin):
    """ChangeVLM with a language model head: loss, logits, `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ChangeVLMConfig) -> None:
        super().__init__(config)
        self.model = ChangeVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, *args: Any, **kwargs: Any) -> ImageFeatures:
        """See `ChangeVLMModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ChangeVLMOutput | tuple[Any, ...]:
        """Text with image placeholders, and the images, to logits and loss.

        Args:
            input_ids: [B, T]; each image stands as N ids of `config.image_token_id`.
            pixel_values, image_counts, image_sizes: see `ChangeVLMModel.get_image_features`. Pairs are [B, 2, C, S, S].
            labels: [B, T], -100 where nothing is to be learned; not shifted.
            logits_to_keep: compute logits for the last n positions (0: all), or for the given positions.

        Raises:
            DataError: placeholders and image features differ in number.
        """
        if labels is not None:
            use_cache = False  # config.text_config.use_cache would build one in training
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_counts=image_counts,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        output = ChangeVLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            change=outputs.change,
        )
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_counts: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images go in with the prompt only: the tower runs once a call."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            logits_to_keep=logits_to_keep,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if (is_first_iteration or not kwargs.get("use_cache", True)) and inputs.get("inputs_embeds") is None:
            inputs |= {"pixel_values": pixel_values, "image_counts": image_counts, "image_sizes": image_sizes}
        return inputs
