"""`python -m llava` is the `llava` command."""

import sys

from llava.cli import main

sys.exit(main())
