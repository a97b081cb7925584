# SPDX-License-Identifier: Apache-2.0
"""One all-to-all between two ranks, without importing the package: a torchrun script.

torchrun --nproc-per-node 2 tests/smoke_two_ranks.py
"""

import torch
import torch.distributed as dist


def main() -> None:
    """Exchange rows of uneven sizes; every rank checks what it received."""
    dist.init_process_group("automoe")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # Rank r sends r + d + 1 rows to rank d, each filled with 10 * r + d.
    input_split_sizes = [rank + peer + 1 for peer in range(world_size)]
    rows = [
        torch.full((count, 3), 10 * rank + peer)
        for peer, count in enumerate(input_split_sizes)
    ]
    received = torch.empty(sum(input_split_sizes), 3, dtype=torch.int64)
    # The sizes are symmetric: what goes to a peer is as long as what comes from it.
    dist.all_to_all_single(
        received, torch.cat(rows), input_split_sizes, input_split_sizes
    )
    expected = torch.cat(
        [
            torch.full((count, 3), 10 * peer + rank)
            for peer, count in enumerate(input_split_sizes)
        ]
    )
    if not torch.equal(received, expected):
        raise AssertionError(f"rank {rank} received {received}, expected {expected}")
    dist.destroy_process_group()
    print(f"rank {rank} of {world_size}: all_to_all_single is right", flush=True)


if __name__ == "__main__":
    main()
