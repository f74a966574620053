"""peft's model, saving what a folder needs to be loaded by itself."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.train.adapters import CONFIG_FILE


class AdaptedModel(PeftModel):
    """A ChangeVLM with an adapter on it, as `llava.train.adapters.add_adapter` makes it."""

    def get_base_model(self) -> ChangeVLMForConditionalGeneration:
        """The ChangeVLM itself, the adapter in its layers: for whatever works with one, such as `ChangeCaptioner`."""
        return cast(ChangeVLMForConditionalGeneration, super().get_base_model())

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """The adapter and the model's config. peft would ask the hub about the embeddings, which no adapter changes."""
        kwargs.setdefault("save_embedding_layers", False)
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if kwargs.get("is_main_process", True):
            self.get_base_model().config.to_json_file(Path(save_directory) / CONFIG_FILE)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """None: peft's would be empty; `llava card` writes one from scores."""
