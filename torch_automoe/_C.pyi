# SPDX-License-Identifier: Apache-2.0
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import Backend, Store, Work

class Options(Backend.Options):
    """Settings of one process group; each is optional.

    Attributes:
        merge_rows: whether equal rows of one all-to-all cross the network to a node
            once; None: as AUTOMOE_MERGE_ROWS says.
        node: pins the node of this rank, see AUTOMOE_NODE; "": as that says, or found.
        max_ctas: the most thread blocks that a kernel between CUDA devices takes, of
            ours and of NCCL's; None: no limit. A multiprocessor (SM) runs several
            blocks, so it bounds the SMs too. Ranks may differ. ValueError: below 1.
        wire: "exact"; or "fp8": floating rows of a dispatch on CUDA devices, gradients
            included, cross between nodes as float8_e4m3 with a scale for each 128
            elements. The same on all ranks. ValueError: another word.
        peer_all_to_all: an ``all_to_all_single`` without split sizes on CUDA tensors of
            at most this many bytes goes through memory that the GPUs of the node share,
            where all ranks are on one node; 0: all go to NCCL. None: the first one
            measures both ways, and the faster is taken, outside of graphs. The same on
            all ranks.
    """

    merge_rows: bool | None
    node: str
    max_ctas: int | None
    wire: str
    peer_all_to_all: int | None

    def __init__(
        self,
        *,
        timeout: timedelta = ...,
        merge_rows: bool | None = None,
        node: str = "",
        max_ctas: int | None = None,
        wire: str = "exact",
        peer_all_to_all: int | None = None,
    ) -> None:
        """``timeout`` of every operation; 30 minutes: as the group's ``timeout``.

        Raises:
            TypeError: another setting, or one of another type.
            ValueError: max_ctas below 1, or no such wire.
        """

class ProcessGroupAutoMoe(Backend):
    """The c10d backend of one group; made by ``torch_automoe.backend``."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        name: str,
        global_ranks: list[int],
        options: Options,
        inner: Backend | None = None,
    ) -> None:
        """Collective over all ranks of the group.

        Raises:
            ValueError: ranks disagree (protocol version, AUTOMOE_NODE), or the
                process was forked from one that used the backend.
            torch.distributed.DistBackendError: the system or the network failed.
        """

    def topology(self) -> dict[str, Any]: ...
    def explain_exchange(self) -> str: ...
    def stats(self) -> dict[str, int]: ...

def device_facts(rank: int, nccl_shares_gpus: bool, why_no_device: str) -> bytes:
    """What this process sees of its GPU; ``why_no_device``: none is looked for."""

def explain_device(facts: bytes) -> list[str]: ...
def explain_devices(facts: list[bytes], node_of_rank: list[int]) -> list[str]:
    """Lines on each pair of ranks, and on the way that CUDA tensors can take.

    Raises:
        RuntimeError: bytes that are no facts.
    """

def describe_device_group(group_name: str) -> str:
    """How CUDA tensors go between the ranks of a group of ours, and why."""

def shutdown(timeout: timedelta) -> None:
    """Leave all groups and end the threads; at most ``timeout`` for node-mates."""

def dump_flight_record(stack_traces: bool = True, only_active: bool = False) -> bytes:
    """Return what was posted lately as a pickle, in the format of torch's recorder."""

def choose_interface() -> dict[str, str]:
    """Return name, address and reason of the network interface between nodes.

    Raises:
        ValueError: AUTOMOE_INTERFACE names one that is not up.
    """

def refuse(group_name: str, fault: str) -> None:
    """Let every other rank raise ``fault`` where it makes its next call on the group.

    Where it refuses that call too, nothing happens.
    """

def dispatch_async(
    xs: list[Tensor],
    topk_weights: Tensor | None,
    route: Tensor,
    receive_index: Tensor,
    group_name: str,
    packed: bool = False,
) -> tuple[Work, list[Tensor], Tensor]:
    """Do as ``torch.ops.automoe.dispatch``, without blocking and without gradients.

    The tensors may be read once the Work has ended well.
    """

def combine_async(
    rows: Tensor,
    weights: Tensor | None,
    scalars: Tensor | None,
    route: Tensor,
    receive_index: Tensor,
    group_name: str,
    num_tokens: int,
    topk: int,
    packed: bool = False,
) -> tuple[Work, Tensor, Tensor]:
    """Do as ``torch.ops.automoe.combine``, without blocking and without gradients.

    The tensors may be read once the Work has ended well.
    """
