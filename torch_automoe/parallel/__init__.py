# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism for models as they are: meshes, experts, FSDP2, clipping."""

from torch_automoe.parallel.transformers_experts import register_if_imported

register_if_imported()
