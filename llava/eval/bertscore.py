"""BERTScore (Zhang et al., 2020): how well the words of caption and reference match in a language model's eyes.

Written on transformers alone. As in the authors' program without idf and rescaling: the F-score of greedy
matching by cosine, special tokens may be matched but count nothing, the best reference counts.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava.errors import ConfigError, DataError, DownloadError

if TYPE_CHECKING:
    import torch

LAYERS = {
    "roberta-large": 17,
    "roberta-base": 10,
    "bert-base-uncased": 9,
    "distilbert-base-uncased": 5,
    "microsoft/deberta-xlarge-mnli": 40,
}
"""The layer whose states are compared, as the authors chose it on human judgements."""


class BertScore:
    """BERTScore as a measure: `BertScore(model)(captions, references)` gives each caption's F as a fraction of 1.

    model: hub id or folder of an encoder with its tokenizer. layer: counted from 1; may be left out for the
    models in LAYERS. device: where the encoder runs.
    Raises ConfigError for a layer the model lacks, DownloadError for a model that is not there.
    """

    def __init__(
        self, model: str, layer: int | None = None, device: str = "cpu", batch_size: int = 64
    ) -> None:
        from transformers import AutoModel, AutoTokenizer

        known = LAYERS.get(model, LAYERS.get(model.rsplit("/", 1)[-1]))
        if layer is None and known is None:
            raise ConfigError(
                f"BERTScore with {model}: which layer? Known without asking: {', '.join(LAYERS)}; "
                "for another model give --bertscore-layer N"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.encoder = AutoModel.from_pretrained(model, trust_remote_code=False).to(device).eval()
        except (OSError, ValueError) as error:
            raise DownloadError(
                f"BERTScore: {model} cannot be loaded ({str(error).splitlines()[0]}). Give a folder, or a hub id "
                "while there is a network; HF_HOME says where fetched models are kept"
            ) from error
        config = self.encoder.config
        self.layer = layer or known or 0
        if not 1 <= self.layer <= config.num_hidden_layers:
            raise ConfigError(
                f"BERTScore: layer {self.layer} of {model}, which has layers 1 to {config.num_hidden_layers}"
            )
        self.batch_size = batch_size
        positions = getattr(config, "max_position_embeddings", 512)
        # RoBERTa numbers positions from 2 on.
        self.max_length = min(self.tokenizer.model_max_length, positions - 2 if positions > 2 else 512)
        # These tokenizers take a word without a space before it for another one than inside a sentence.
        self._lead = " " if type(self.tokenizer).__name__.startswith(("Roberta", "GPT2")) else ""

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        if len(captions) != len(references):
            raise DataError(
                f"BERTScore got {len(captions)} captions and {len(references)} lists of references"
            )
        states = self._encode(sorted({*captions, *(text for group in references for text in group)}))
        return [
            max(_f_score(states[text], states[line]) for line in group)
            for text, group in zip(captions, references, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> "dict[str, tuple[torch.Tensor, torch.Tensor]]":
        """text -> (unit states [T, D], which of the T tokens are words [T])."""
        import torch

        found = {}
        texts = sorted(texts, key=len)  # alike in length: little padding
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            tokens = self.tokenizer(
                [self._lead + text.encode(errors="replace").decode() for text in batch],
                padding=True,
                truncation=True,
                max_length=self.max_length,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
            special = tokens.pop("special_tokens_mask").bool()
            present = tokens["attention_mask"].bool()
            with torch.inference_mode():
                out = self.encoder(**tokens.to(self.encoder.device), output_hidden_states=True)
            states = out.hidden_states[self.layer].float()  # [B, T, D]
            states = torch.nn.functional.normalize(states, dim=-1).cpu()
            for row, text in enumerate(batch):
                here = present[row]
                found[text] = states[row, here], ~special[row, here]
        return found


def _f_score(
    said: "tuple[torch.Tensor, torch.Tensor]", reference: "tuple[torch.Tensor, torch.Tensor]"
) -> float:
    (said_states, said_words), (true_states, true_words) = said, reference
    if not said_words.any() or not true_words.any():
        return 0.0
    likeness = said_states @ true_states.T  # [T of the caption, T of the reference]
    precision = likeness.max(1).values[said_words].mean().item()
    recall = likeness.max(0).values[true_words].mean().item()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
