# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism for models as they are: meshes, experts, FSDP2, clipping."""
