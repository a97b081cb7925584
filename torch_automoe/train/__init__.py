# SPDX-License-Identifier: Apache-2.0
"""A byte-level mixture-of-experts language model, trained with plain PyTorch.

This package is the product's example: stock FSDP2 for the dense part, ``dispatch``
and ``combine`` for the experts. Read it in this order: ``exchange.py`` (how rows
reach their experts), ``moe.py`` (router and experts), ``parallel.py`` (what is
sharded where), ``loop.py`` (the training loop). ``docs/train.md`` explains the choices.
"""
