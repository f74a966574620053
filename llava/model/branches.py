"""One pass per pair: the attention mask and positions of rows whose answers branch off one shared prefix.

`segments` [B, T] says what a position belongs to: 0 the prefix, which opens a row, 1..K a branch, -1 padding, which
closes it. A branch sees the prefix and itself, and its positions continue the prefix's: to it, it stands alone.
A row may hold several such texts, one behind the other, each of which stands alone too: those of the second are TEXT
higher, of the third 2 TEXT, and so on.

What an explicit mask costs: at T = 1,575 (a pair and five captions) attention in "sdpa" takes some 1.6 times that of
the plain causal kernel, and 6 % of a Qwen2-0.5B layer in float32 on a CPU. It is shared by all heads without a copy,
and made in numbers once: of a bool one each layer would make, and keep for its backward pass, numbers of its own. Rows
of one branch need none and get none.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from llava.errors import ConfigError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""flex_attention's own."""
TEXT = 2**16
"""How much higher the segments of a row's next text are: more than a text has branches."""


def branch_mask(segments: Tensor) -> Tensor:
    """Which position may attend which: [B, T] segments to [B, 1, T, T] bool.

    Padding attends itself, so that no row is empty.
    """
    positions = torch.arange(segments.shape[1], device=segments.device)
    causal = positions[:, None] >= positions[None]  # [T, T]
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & _seen(query, key))[:, None]


def _seen(query: Tensor, key: Tensor) -> Tensor:
    """Whether positions of one segment are seen by those of another, were they before them."""
    return (key == query) | (key == query - query % TEXT)  # of padding, -1, that is -TEXT, which nothing has


def block_mask(segments: Tensor) -> "BlockMask":
    """The same for flex_attention, which skips blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, length = segments.shape
    padded = F.pad(segments, (0, -length % BLOCK), value=-1)  # kernels read whole blocks

    def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & _seen(padded[row, query], padded[row, key])

    return create_block_mask(allowed, batch, None, length, length, device=segments.device, BLOCK_SIZE=BLOCK)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask [B, 1, T, T] as what attention adds to the scores; eager attention would add True as 1."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


APART = ("sdpa", "eager", "flex_attention")
"""Implementations that can keep branches and texts of a row apart."""


def attention_mask(segments: Tensor, attention: str, dtype: torch.dtype) -> "Tensor | BlockMask | None":
    """What a language model of transformers takes for `segments`, by its attention implementation.

    Args:
        attention: "sdpa", "eager" (both added to the scores) or "flex_attention" (blocks). Rows of one branch each are
            plain causal text, for any implementation: None.
        dtype: of what is added. In "sdpa" under autocast it has the queries', which each layer would turn it into.

    Raises:
        ConfigError: several branches for an implementation that cannot keep them apart.
    """
    if not segments.numel() or int(segments.max()) < 2:
        return None
    if attention == "flex_attention":
        return block_mask(segments)
    if attention in ("sdpa", "eager"):
        device = segments.device.type
        if attention == "sdpa" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return additive(branch_mask(segments), dtype)
    raise ConfigError(
        f"attention {attention!r} cannot keep apart several captions of a pair in one pass: set attn_implementation to "
        '"sdpa" (or "flex_attention" on a GPU), or one_pass to false for one sample a caption'
    )


def branch_positions(segments: Tensor) -> Tensor:
    """[B, T] segments to positions [B, T]: 0, 1, ... in a prefix, from its end on in every branch, 0 in padding."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    opens = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    starts = torch.where(opens, places, 0).cummax(dim=1).values  # where a position's segment begins
    own = segments - segments % TEXT  # [B, T], the segment of the prefix before it
    prefix = (segments[:, None] == own[:, :, None]).sum(dim=2)  # [B, T], how long that is
    return (torch.where(segments == own, 0, prefix) + places - starts).masked_fill(segments < 0, 0)
