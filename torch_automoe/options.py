# SPDX-License-Identifier: Apache-2.0
"""What a process group can be given: ``pg_options=automoe.Options(...)``."""

from __future__ import annotations

from torch_automoe import _loader

Options = _loader.load().Options
