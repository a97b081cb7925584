# SPDX-License-Identifier: Apache-2.0
"""Runs every family of transformers that has experts, and writes docs/families.md.

    torchrun --nproc-per-node 2 tools/moe_families.py [--write] [FAMILY ...]

Each family is a tiny model with random parameters, unmodified, whose experts lie on
the ranks by ``automoe.parallelize``. Logits and all gradients are compared with those
of the same model in one process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import torch_automoe as automoe

TABLE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Their routers or experts are float32, whatever type the rest has.
_ONLY_FLOAT32 = {"inkling2", "inkling2_loop", "openai_privacy_filter"}
_LENGTH = 12


@dataclass
class Result:
    """How a family did.

    Attributes:
        works: its logits and gradients equal those of one process.
        how: the kinds of adapters.
        model: the class that was run.
        reason: of a refusal, or what went wrong.
        error: the largest difference, relative to the largest entry of a tensor.
        dtype: that it was compared in.
    """

    works: bool
    how: str = ""
    model: str = ""
    reason: str = ""
    error: float = 0.0
    dtype: str = ""

    @property
    def word(self) -> str:
        """What the table calls it."""
        if self.works:
            return "works"
        return "differs" if self.how else "refused"


def run_family(family: str, ep: int = 2) -> Result:
    """Compare one family with a single process; collective over all ranks."""
    dtype = torch.float32 if family in _ONLY_FLOAT32 else torch.float64
    model = tiny_models.tiny_model(family, dtype)
    name = type(model).__name__
    try:
        pair = Pair(model, ep)
    except ValueError as error:
        return Result(False, model=name, reason=_first_reason(str(error)))
    how = sorted({line.split("(")[1].split(")")[0] for line in pair.explanation})
    error, where = pair.compare()
    dtype = pair.dtype
    works = error <= TOLERANCE[dtype]
    reason = "" if works else f"{where} is off by {error:.1g}"
    return Result(works, ", ".join(how), name, reason, error, str(dtype)[6:])


class Pair:
    """A model over all ranks beside its copy in one process.

    Attributes:
        parallel: experts over ep, ``fully_shard`` on all ranks.
        single: the copy.
        ids: (ranks, S) a sequence for each rank.
        explanation: lines of ``automoe.explain``.
        dtype: of the outputs; some families compute the last ones in float32.
    """

    def __init__(self, model: nn.Module, ep: int, **options: Any) -> None:
        """Raises ValueError where ``parallelize`` refuses the model."""
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.single = copy.deepcopy(model)
        with contextlib.suppress(AttributeError, ValueError):
            # The other implementations do not know float64.
            self.single.set_experts_implementation("eager")
        mesh = automoe.init_moe_mesh("cpu", ep=ep)
        automoe.parallelize(model, mesh, **options)
        for layers in _lists_of_layers(model):
            for layer in layers:
                fully_shard(layer, mesh=mesh.dense)
        fully_shard(model, mesh=mesh.dense)
        self.parallel = model
        self.dtype = torch.float32
        self.explanation = automoe.explain(model).splitlines()
        size = dist.get_world_size()
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(4, 64, (size, _LENGTH), generator=generator)

    def compare(self) -> tuple[float, str]:
        """Run both forward and backward; return the largest error and its place."""
        rank, size = dist.get_rank(), dist.get_world_size()
        # One by one: the size of a batch moves the last bits of float32 routers.
        outputs = []
        for number, row in enumerate(self.ids):
            torch.manual_seed(number)  # some routers draw lots in training
            outputs.append(run_model(self.single, row[None]))
        loss = sum(measure(out) for out in outputs) / size
        loss.backward()
        torch.manual_seed(rank)
        out = run_model(self.parallel, self.ids[rank][None])
        measure(out).backward()
        self.dtype = out.dtype
        errors = {"logits": _error(out, outputs[rank], 0.0)}
        errors |= self.compare_gradients()
        where = max(errors, key=lambda name: _order(errors[name]))
        return errors[where], where

    def compare_gradients(self) -> dict[str, float]:
        """Errors of all gradients; each is gathered to all ranks."""
        wanted = gradients_of(self.single)
        got = gradients_of(self.parallel)
        largest = max(g.abs().max().item() for g in wanted.values())
        return {
            f"the gradient of {name}": _error(got[name], grad, 1e-4 * largest)
            for name, grad in stacked_like(wanted, got).items()
        }


def _lists_of_layers(model: nn.Module) -> list[nn.ModuleList]:
    """Lists of decoder layers: units of FSDP, as people choose them."""
    found = []
    for name, module in model.named_modules():
        layers = isinstance(module, nn.ModuleList) and name.endswith(".layers")
        if layers and not any(isinstance(m, FSDPModule) for m in module):
            found.append(module)
    return found


def run_model(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    inputs = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def measure(out: Tensor) -> Tensor:
    """A loss that no symmetry of the model makes constant."""
    generator = torch.Generator().manual_seed(2)
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return (out * probe.to(out.dtype)).mean()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name, zeros where there is none; collective."""
    return {
        name: _whole(p.grad if p.grad is not None else torch.zeros_like(p))
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def stacked_like(single: dict[str, Tensor], names: dict[str, Any]) -> dict[str, Tensor]:
    """Stack tensors of experts in lists, so that they are called as in ``names``.

    layers.0.experts.3.w1.weight (or expert_3.) is part 3 of layers.0.experts.w1.weight.
    """
    stacked: dict[str, list[Tensor]] = {}
    for name, tensor in single.items():
        if name in names:
            stacked[name] = tensor
            continue
        parts = name.split(".")
        number = next(
            i
            for i, part in enumerate(parts)
            if i
            and "experts" in parts[i - 1]
            and part.removeprefix("expert_").isdigit()
        )
        stacked.setdefault(".".join(parts[:number] + parts[number + 1 :]), []).append(
            tensor
        )
    return {
        name: torch.stack(part) if isinstance(part, list) else part
        for name, part in stacked.items()
    }


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _error(got: Tensor, wanted: Tensor, floor: float) -> float:
    scale = max(wanted.abs().max().item(), floor, 1e-300)
    return (got.detach() - wanted.detach()).abs().max().item() / scale


def _order(error: float) -> float:
    return error if error == error else float("inf")  # nan is the worst


def _first_reason(text: str) -> str:
    """The first refused module's line of ``parallelize``'s message."""
    lines = text.splitlines()
    return lines[1].strip() if len(lines) > 1 else text


def survey(families: list[str]) -> dict[str, Result]:
    """Run families one after another; the same result on all ranks."""
    results = {}
    for family in families:
        result = run_family(family)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, result)
        # Ranks look at their own logits, so the worst one counts.
        results[family] = max(everywhere, key=lambda r: (not r.works, r.error))
        if dist.get_rank() == 0:
            print(family, results[family], flush=True)
    return results


def table(results: dict[str, Result], version: str) -> str:
    """docs/families.md."""
    works = sum(result.works for result in results.values())
    lines = [
        "# Families of transformers",
        "",
        f"All {len(results)} families of transformers {version} that have experts: "
        f"{works} work unmodified. Written by "
        "`torchrun --nproc-per-node 2 tools/moe_families.py --write`, which builds a "
        "tiny random model of each, calls `automoe.parallelize` and `fully_shard`, and "
        "compares logits and every gradient with one process (float64 within 1e-10, "
        "float32 within 1e-5, of the largest entry).",
        "",
        "| family | | how | class, type, largest error; or the reason |",
        "|---|---|---|---|",
    ]
    for family, result in results.items():
        if result.works:
            text = f"{result.model}, {result.dtype}, {result.error:.0e}"
        else:
            text = result.reason.replace("|", "\\|")
        lines.append(f"| {family} | {result.word} | {result.how} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the families that are named, or all; write the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("automoe")
    import transformers

    transformers.logging.set_verbosity_error()
    results = survey(options.families or tiny_models.moe_families())
    if options.write and dist.get_rank() == 0:
        TABLE.write_text(table(results, transformers.__version__), encoding="ascii")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
