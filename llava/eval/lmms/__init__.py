"""lmms-eval, both ways: our models on its tasks, and its models on change captioning.

Installing. `pip install lmms-eval` asks for some fifty packages. These are enough for what is here (0.7.3):

    pip install "llava[eval]" accelerate datasets loguru tenacity sacrebleu evaluate pytablewriter
    pip install --no-deps lmms-eval

Some of its models need more, which they name (`decord` for `llava_hf`); its `llava` is another package of our name.

Our model is `--model llava_change`, known to lmms-eval by this package's entry point. It compares two images, so
it takes the tasks whose documents have two, and says so of any other:

    lmms-eval --model llava_change --model_args pretrained=tiny,dtype=float32 --tasks NAME --batch_size 16

Our tasks are YAML files in the folder that `python -m llava.eval.lmms` prints. Run them in the folder of the data,
with any model of lmms-eval:

    llava synth data --test 200 && cd data
    lmms-eval --model llava_change --model_args pretrained=tiny --batch_size 16 \\
        --include_path "$(python -m llava.eval.lmms)" --tasks change_caption --output_path ../lmms --log_samples
    lmms-eval --model llava_hf --model_args pretrained=llava-hf/llava-onevision-qwen2-0.5b-ov-hf,device_map=cuda \\
        --include_path "$(python -m llava.eval.lmms)" --tasks change_caption --output_path ../lmms --log_samples

`change_caption` reads `test.jsonl`, records as everywhere else here, and `levir_cc` reads LEVIR-CC's own
`LevirCCcaptions.json` with its `images`. For other files and folders, or another way to ask, write a task of your
own and give its folder as `--include_path`:

    # mine/mine.yaml
    include: FOLDER/change_caption.yaml     # FOLDER as printed
    task: mine
    dataset_kwargs: {data_files: {test: ../mine/val.jsonl}}
    lmms_eval_specific_kwargs: {default: {root: ../mine, post_prompt: " Answer in one short sentence."}}

Scores are those of `llava score`, in percent. One model on several cards: put
`accelerate launch --num_processes N -m lmms_eval` where the commands say `lmms-eval`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

TASKS = Path(__file__).parent / "tasks"
"""Folder of the tasks, for `--include_path`."""


def manifest() -> "ModelManifest":
    """What lmms-eval's registry needs to know of our model; the entry point in the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="llava_change", simple_class_path=f"{__name__}.model.LlavaChange")
