"""What the small models of benchmarks/six_tasks.py start from: `tiny-base`, in both families, made fit for six tasks.

    python benchmarks/six_start.py --family change --words tasks/train.jsonl --out runs/start
    python benchmarks/six_start.py --family delta --fusion csrm --words tasks/train.jsonl --out runs/start_delta

- Patches are smaller, 16 pixels of 192 in place of 24: 12 x 12 of them, four for a third of a side, so that a cell of a
  3 x 3 grid is whole patches. Their weights and the codes of their places are interpolated.
- The tokenizer is trained on the questions and answers too, which `tiny-base` would spell. Words that both know keep
  their embedding; any other gets the mean of the old pieces that spell it.
- A DeltaVLM has the same tower and language model with a new Q-Former between them, so both families begin with the
  same eyes and the same words. The tower goes from SigLIP's layout to InstructBLIP's: its key biases, which shift all
  of a softmax alike, go; the pixel statistics move into the patch weights; a class token is new.
"""

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from llava.assets import built_in_path
from llava.data.record import parse_record
from llava.model.change_vlm import ChangeVLMForConditionalGeneration
from llava.model.delta_vlm.configuration import DeltaVLMConfig
from llava.model.delta_vlm.modeling import DeltaVLMForConditionalGeneration
from llava.model.delta_vlm.processing import CLIP_MEAN, CLIP_STD, DeltaVLMProcessor
from llava.model.processing import ChangeVLMProcessor, add_image_token
from llava.train.tokenizer import train_tokenizer

PATCH = 16
VOCABULARY = 1200
READ = 9000
"""Records whose words make the tokenizer: a thousand pairs."""
EMBEDDINGS = "model.vision_tower.encoder.embeddings."
QFORMER = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "cross_attention_frequency": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def words_of(path: Path) -> list[str]:
    """Captions, questions and answers of the first records of a file."""
    texts: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for line in islice(lines, READ):
            record = parse_record(json.loads(line), str(path))
            texts += [*record.change_caption, *(text for turn in record.conversation for text in turn)]
    return texts


def start(words: Path, patch: int = PATCH) -> tuple[ChangeVLMForConditionalGeneration, ChangeVLMProcessor]:
    """`tiny-base` with other patches and other words, in float32."""
    folder = built_in_path("tiny-base")
    base = ChangeVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    weights = dict(base.state_dict())
    config: Any = base.config
    before, old = config.grid, int(config.vision_config.patch_size)
    config.vision_config.patch_size = patch
    kernel, codes = (EMBEDDINGS + name for name in ("patch_embedding.weight", "position_embedding.weight"))
    # an even colour gives what it gave
    smaller = F.interpolate(weights[kernel], size=(patch, patch), mode="bilinear", antialias=True)
    weights[kernel] = smaller * (old / patch) ** 2
    places = weights[codes].T.view(1, -1, before, before)  # [1, D, 8, 8]
    places = F.interpolate(places, size=(config.grid, config.grid), mode="bicubic", align_corners=False)
    weights[codes] = places.flatten(2)[0].T

    known = AutoTokenizer.from_pretrained(folder)
    tokenizer = train_tokenizer(words_of(words), VOCABULARY)
    config.image_token_id = add_image_token(tokenizer)
    config.text_config.vocab_size = len(tokenizer)
    for held in (config, config.text_config):
        held.eos_token_id, held.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    name = "model.language_model.embed_tokens.weight"
    weights[name] = reworded(weights[name], known, tokenizer)
    weights["lm_head.weight"] = weights[name]
    model = ChangeVLMForConditionalGeneration(config)
    model.load_state_dict(weights)
    processor = ChangeVLMProcessor.for_config(config, tokenizer)
    processor.chat_template = ChangeVLMProcessor.from_pretrained(folder).chat_template
    return model, processor


def reworded(rows: Tensor, known: Any, tokenizer: Any) -> Tensor:
    """Embeddings [V, H] of one byte-level vocabulary for another, [V', H]."""
    places, units = known.get_vocab(), known.backend_tokenizer.model
    found = []
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        pieces = [places[token]] if token in places else [piece.id for piece in units.tokenize(token)]
        found.append(rows[pieces].mean(0))
    return torch.stack(found)


def tower_weights(siglip: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a SigLIP encoder by InstructBLIP's names; pixels are then normalised by CLIP's statistics."""
    patch = siglip["embeddings.patch_embedding.weight"]  # [D, 3, p, p]
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    # (x - .5) / .5 = (y std + mean - .5) / .5 for y = (x - mean) / std
    weights = {
        "embeddings.patch_embedding.weight": patch * std / 0.5,
        "embeddings.patch_embedding.bias": siglip["embeddings.patch_embedding.bias"]
        + (patch * (mean - 0.5) / 0.5).sum((1, 2, 3)),
        "embeddings.class_embedding": torch.zeros(1, 1, patch.shape[0]),
    }
    places = siglip["embeddings.position_embedding.weight"]  # [N, D]
    weights["embeddings.position_embedding"] = torch.cat([torch.zeros_like(places[:1]), places])[None]
    for k in range(layers):
        old, new = f"encoder.layers.{k}.", f"encoder.layers.{k}."
        for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
            for kind in ("weight", "bias"):
                weights[f"{new}{name}.{kind}"] = siglip[f"{old}{name}.{kind}"]
        attention = f"{old}self_attn."
        qkv = [siglip[f"{attention}{x}_proj.weight"] for x in "qkv"]
        weights[f"{new}self_attn.qkv.weight"] = torch.cat(qkv)
        biases = [siglip[f"{attention}{x}_proj.bias"] for x in "qv"]
        weights[f"{new}self_attn.qkv.bias"] = torch.cat([biases[0], torch.zeros_like(biases[0]), biases[1]])
        for kind in ("weight", "bias"):
            weights[f"{new}self_attn.projection.{kind}"] = siglip[f"{attention}out_proj.{kind}"]
    return weights


def delta(
    words: Path, fusion: dict[str, Any], seed: int
) -> tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor]:
    """The model with its processor; everything in it may learn."""
    base, processor = start(words)
    tokenizer = processor.tokenizer
    held: Any = base.config
    vision = held.vision_config
    config = DeltaVLMConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
            "initializer_range": 0.02,
        },
        qformer_config={**QFORMER, "vocab_size": len(tokenizer)},
        text_config=held.text_config,
        num_query_tokens=32,
        fusion=fusion,
        tune_vision_blocks=vision.num_hidden_layers,
        tune_language_model=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = DeltaVLMForConditionalGeneration(config)
    tower = dict(base.model.vision_tower.encoder.state_dict())
    tower = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    missing, unexpected = model.model.vision_tower.load_state_dict(
        tower_weights(tower, vision.num_hidden_layers), strict=False
    )
    if unexpected or set(missing) - {"post_layernorm.weight", "post_layernorm.bias"}:
        raise AssertionError(f"tower: {missing} are missing, {unexpected} unexpected")
    model.model.language_model.load_state_dict(base.model.language_model.state_dict())
    return model, DeltaVLMProcessor.for_config(config, tokenizer, tokenizer)


def main() -> None:
    """Write one to a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--words", type=Path, required=True, help="records (JSON Lines) to take words from")
    parser.add_argument("--family", choices=("change", "delta"), required=True)
    parser.add_argument(
        "--fusion", default="csrm", help="of delta: csrm, csrm_paper, concat, ... (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is new (default: %(default)s)")
    args = parser.parse_args()
    model: Any
    processor: Any
    if args.family == "change":
        model, processor = start(args.words)
    else:
        model, processor = delta(args.words, {"kind": args.fusion}, args.seed)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in {args.out}")


if __name__ == "__main__":
    main()
