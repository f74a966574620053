"""Fine-tuning on transformers' Trainer; overridden is only what differs."""

import copy
import dataclasses
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

from llava.data.collate import BranchCollator
from llava.data.dataset import CaptionDataset
from llava.data.record import read_records
from llava.errors import ConfigError, MissingDependencyError
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.configuration import ChangeVLMConfig
from llava.model.processing import ChangeVLMProcessor
from llava.train.config import TrainConfig, part_of


def with_fusion(
    model: ChangeVLMForConditionalGeneration, fusion: dict[str, Any] | None
) -> ChangeVLMForConditionalGeneration:
    """The same weights with another fusion, freshly initialised (draws from torch's global generator), or with none."""
    fields = copy.deepcopy(model.config).to_dict()
    config = ChangeVLMConfig.from_dict({**fields, "fusion": fusion})
    other = ChangeVLMForConditionalGeneration(config)
    other.to(dtype=model.dtype)  # type: ignore[call-arg]
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("model.fusion.")}
    result = other.load_state_dict(kept, strict=False)
    wrong = [n for n in (*result.missing_keys, *result.unexpected_keys) if not n.startswith("model.fusion.")]
    assert not wrong, wrong
    other.generation_config = model.generation_config
    return other


def set_learning(model: nn.Module, learn: Any) -> None:
    """Freeze every part that is not named."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in learn)


class ChangeTrainer(Trainer):
    """The Trainer with one learning rate a part, and the loss on change masks where a run asks for it."""

    def __init__(self, *args: Any, run: TrainConfig, **kwargs: Any) -> None:
        self.run = run
        super().__init__(*args, **kwargs)
        self.mask_head: nn.Linear | None = None
        self.map_head: nn.Module | None = None
        self._mask_losses: list[torch.Tensor] = []
        if run.mask_weight > 0:
            if self.args.world_size > 1:
                raise ConfigError(
                    "mask_weight is for one process: its head is not synchronised between several"
                )
            assert isinstance(self.model, ChangeVLMForConditionalGeneration)
            self.image_token_id = self.model.config.image_token_id
            self.mask_head = nn.Linear(self.model.config.text_config.hidden_size, 1).to(self.args.device)
            self.map_head = getattr(self.model.model.fusion, "map_head", None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The model's own loss, and the masks' on top of it."""
        shares = inputs.pop("changed_share", None)  # [B, N]
        if self.mask_head is None or shares is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        middle = outputs.hidden_states[len(outputs.hidden_states) // 2]  # [B, T, H]
        images = middle[inputs["input_ids"] == self.image_token_id]  # [B 2 N, H], before then after
        after = images.unflatten(0, (len(shares), 2, -1))[:, 1]  # [B, N, H]
        masks = F.binary_cross_entropy_with_logits(self.mask_head(after)[..., 0].float(), shares)
        if self.map_head is not None:
            logits = self.map_head(outputs.change)[..., 0].float()  # [B, N]
            masks = masks + F.binary_cross_entropy_with_logits(logits, shares)
        self._mask_losses.append(masks.detach())
        loss = loss + self.run.mask_weight * masks / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the masks' mean loss since the last line, before its weight; `loss` holds both."""
        if self._mask_losses and "loss" in logs:
            logs["mask_loss"] = round(torch.stack(self._mask_losses).mean().item(), 4)
            self._mask_losses.clear()
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Parameters grouped by part and by whether they decay (vectors do not)."""
        if self.optimizer is None:
            assert isinstance(self.model, ChangeVLMForConditionalGeneration)
            groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rate = self.run.part_learning_rate.get(part_of(name), self.run.learning_rate)
                    groups[rate, self.run.weight_decay if parameter.dim() > 1 else 0.0].append(parameter)
            if self.mask_head is not None:
                groups[self.run.learning_rate, 0.0] += self.mask_head.parameters()
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rows = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
            self.optimizer = kind(rows, **options)
        return self.optimizer


def training_arguments(run: TrainConfig) -> TrainingArguments:
    """The Trainer's settings for a run."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    new, old = "activation_checkpointing", "gradient_checkpointing"  # one thing, by version
    checkpointing: dict[str, Any] = {new if new in known else old: run.gradient_checkpointing}
    return TrainingArguments(
        output_dir=str(run.output_dir),
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=run.gradient_accumulation_steps,
        num_train_epochs=run.epochs,
        max_steps=run.max_steps,
        learning_rate=run.learning_rate,
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm,
        warmup_steps=run.warmup_ratio,
        lr_scheduler_type="cosine",
        bf16=run.bf16,
        seed=run.seed,
        data_seed=run.seed,
        logging_steps=run.logging_steps,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        **checkpointing,
    )


def train(run: TrainConfig) -> ChangeVLMForConditionalGeneration:
    """Fine-tune as `run` says and save the model with its processor.

    Raises:
        LlavaError: a fault in the config, the records or the model; see there.
    """
    try:
        import accelerate  # noqa: F401 (the Trainer's own need, said before anything is loaded)
    except ImportError as error:
        raise MissingDependencyError('training needs accelerate: pip install "llava[train]"') from error
    from llava.captioner import resolve_model

    arguments = training_arguments(run)  # sets the seed: before the model is made
    torch.manual_seed(run.seed)
    source = resolve_model(run.model)
    model = ChangeVLMForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    processor = ChangeVLMProcessor.from_pretrained(source)
    if run.fusion != "keep":
        model = with_fusion(model, run.fusion)
    set_learning(model, run.learn)
    if run.mask_weight == 0 and (map_head := getattr(model.model.fusion, "map_head", None)) is not None:
        map_head.requires_grad_(False)  # nothing would teach it
    dataset = CaptionDataset(
        read_records(run.data),
        run.root or run.data.parent,
        processor,
        captions=run.captions,
        labels=run.labels,
        masks=run.mask_weight > 0,
        cache=run.cache_images,
        seed=run.seed,
    )
    trainer = ChangeTrainer(
        model,
        arguments,
        run=run,
        train_dataset=dataset,
        data_collator=BranchCollator(processor.tokenizer.pad_token_id),
        processing_class=processor,
    )
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / "train.yaml").write_text(run.to_yaml(), encoding="utf-8")
    trainer.train()
    model.eval()
    trainer.save_model(str(run.output_dir))
    return model
