"""What all processes of the tests need, read once by the one that they are forked from."""

import importlib

from mmrdpm.data.emoji import load_emoji

for name in (
    "mmrdpm.cli",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
):
    importlib.import_module(name)
load_emoji(16)
