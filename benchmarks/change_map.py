"""How well the change map finds what changed: each score against the truth of held-out synthetic pairs.

    python benchmarks/change_map.py --model tiny --pairs 200

Printed for each score: area under the ROC curve over patches (a patch counts as changed where at least a quarter
of it did), averaged over changed pairs; and, of the map's mean level, the area that tells changed pairs from unchanged.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llava.captioner import ChangeCaptioner
from llava.model.change_map import SCORES, outstanding, pair_distance
from llava.synth import World


def area(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half."""
    high, low = scores[positive], scores[~positive]
    wins = (high[:, None] > low[None]).double() + 0.5 * (high[:, None] == low[None]).double()
    return float(wins.mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "change_map.json")
    args = parser.parse_args()
    captioner = ChangeCaptioner.from_pretrained(args.model)
    grid = captioner.model.config.grid
    inside: dict[str, list[float]] = {}
    strength: dict[str, list[float]] = {}
    changed = []
    for pair in World(seed=0, split="test", size=256).pairs(0, args.pairs):
        changed.append(pair.changed)
        images = [Image.fromarray(pair.before), Image.fromarray(pair.after)]
        pixels = captioner.processor.image_processor.preprocess(images)["pixel_values"][None]
        with torch.no_grad():
            features = captioner.model.get_image_features(pixels)
        before, after = features.last_hidden_state.unflatten(0, (-1, 2)).unbind(
            1
        )  # the fused dates [1, N, D]
        scores = {name: score(features.change) for name, score in SCORES.items()}
        scores["fused dates"] = pair_distance(before, after)
        levels = {name: outstanding(values) for name, values in scores.items()}
        if captioner.model.model.fusion.map_head is not None:
            scores["map head"] = captioner.model.model.fusion.map_head(features.change)[..., 0].detach()
            levels["map head"] = scores["map head"].sigmoid()
        share = F.adaptive_avg_pool2d(torch.from_numpy(pair.binary_mask).float()[None], grid).flatten()
        for name, values in scores.items():
            strength.setdefault(name, []).append(float(levels[name].mean()))
            if pair.changed and 0 < int((share >= 0.25).sum()) < len(share):
                inside.setdefault(name, []).append(area(values[0], share >= 0.25))
    flags = torch.tensor(changed)
    rows = {
        name: {
            "within pairs": sum(values) / len(values),
            "between pairs": area(torch.tensor(strength[name]), flags),
        }
        for name, values in inside.items()
    }
    print("| score | within changed pairs | changed against unchanged |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['within pairs']:.3f} | {row['between pairs']:.3f} |")
    record = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "command": f"python benchmarks/change_map.py --model {args.model} --pairs {args.pairs}",
        "scores": rows,
    }
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
