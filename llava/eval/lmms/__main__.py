"""`python -m llava.eval.lmms`: prints the folder of our tasks, for lmms-eval's `--include_path`."""

from llava.eval.lmms import TASKS

print(TASKS)
