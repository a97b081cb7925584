# SPDX-License-Identifier: Apache-2.0
"""The options of a training run: one field each, with help text and checks."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields
from typing import Any


class UsageError(ValueError):
    """An option that cannot work; the message names it and both values."""


DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; names as in the command line."""

    dim: int
    layers: int
    heads: int
    num_experts: int
    top_k: int
    expert_dim: int


BYTE_MOE = "byte_moe"
PRESETS = {
    "tiny": ModelConfig(
        dim=128, layers=2, heads=4, num_experts=8, top_k=2, expert_dim=128
    ),
    "small": ModelConfig(
        dim=256, layers=4, heads=8, num_experts=16, top_k=4, expert_dim=128
    ),
}


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that every rank must know; each field is a ``--flag``."""

    data: str = _option(
        "",
        "text to train on: a file or a folder (default: the "
        "source code of the Python standard library)",
        metavar="FILE|DIR",
    )
    backend: str = _option("automoe", "process group backend of all groups")
    model: str = _option(
        BYTE_MOE,
        "byte_moe, the model of this program, or a model type of transformers, trained "
        "as it is: qwen3_moe, mixtral, olmoe, deepseek_v3, gpt_oss, ...",
    )
    preset: str = _option(
        "tiny",
        "sizes of the model where the options below do not say otherwise",
        choices=tuple(PRESETS),
    )
    hf: str = _option(
        "",
        "config.json of a model of transformers, with its own sizes; the options "
        "below for sizes do not count",
        metavar="FILE",
    )
    steps: int = _option(300, "optimizer steps")
    batch: int = _option(8, "sequences per step, over all ranks")
    seq_len: int = _option(128, "bytes per sequence")
    dim: int = _option(128, "model width")
    layers: int = _option(2, "transformer blocks")
    heads: int = _option(4, "attention heads")
    num_experts: int = _option(8, "experts per MoE layer")
    top_k: int = _option(2, "experts per token")
    expert_dim: int = _option(128, "hidden width of each expert")
    ep: int = _option(0, "ranks that share the experts (0: all ranks)")
    lr: float = _option(5e-3, "peak learning rate")
    warmup: int = _option(25, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "AdamW weight decay of matrices")
    max_norm: float = _option(1.0, "gradient clipping (0: only measure the norm)")
    bias_update_rate: float = _option(
        0.01, "step of the balance bias of the experts (0: off)"
    )
    aux_loss_coef: float = _option(0.01, "weight of the sequence balance loss")
    dtype: str = _option(
        "float32", "computation; weights stay float32 under bfloat16", choices=DTYPES
    )
    seed: int = _option(0, "seed of weights, batches and sample")
    run_dir: str = _option(
        "",
        "run folder (default: runs/DATE-TIME; with --resume "
        "the newest one in runs/ that has a checkpoint)",
        metavar="DIR",
    )
    checkpoint_dir: str = _option(
        "", "checkpoints (default: RUN_DIR/checkpoints)", metavar="DIR"
    )
    checkpoint_every: int = _option(0, "steps between checkpoints (0: at the end only)")
    resume: bool = _option(False, "go on from the newest checkpoint")
    eval_windows: int = _option(256, "held-out sequences that are evaluated at the end")
    sample_bytes: int = _option(200, "bytes of text generated at the end (0: none)")
    temperature: float = _option(0.8, "sampling temperature (0: greedy)")
    prompt: str = _option("def ", "beginning of the generated text")
    color: str = _option(
        "auto", "colours (auto: on a terminal)", choices=("auto", "always", "never")
    )
    json: bool = _option(False, "print JSON lines instead of text")

    @property
    def sizes(self) -> ModelConfig:
        """The sizes of the model."""
        return ModelConfig(
            **{name: getattr(self, name) for name in ModelConfig.__annotations__}
        )

    def to_argv(self) -> list[str]:
        """The command line that parses to this configuration."""
        argv = []
        for option in fields(self):
            value = getattr(self, option.name)
            if value is True:
                argv.append(_flag(option.name))
            elif value is not False:
                argv.append(f"{_flag(option.name)}={value}")
        return argv

    def check(self, world_size: int) -> None:
        """Raise UsageError, naming option and values, if the run cannot work."""
        for name in (
            "steps",
            "batch",
            "seq_len",
            "dim",
            "layers",
            "heads",
            "num_experts",
            "top_k",
            "expert_dim",
            "eval_windows",
        ):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "ep",
            "warmup",
            "weight_decay",
            "max_norm",
            "bias_update_rate",
            "aux_loss_coef",
            "checkpoint_every",
            "sample_bytes",
            "temperature",
            "seed",
        ):
            _expect(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _expect(self.lr > 0, "lr", self.lr, "more than 0")
        _expect(self.dtype in DTYPES, "dtype", self.dtype, f"one of {DTYPES}")
        _expect(self.prompt != "", "prompt", repr(self.prompt), "at least one byte")
        _expect(self.preset in PRESETS, "preset", self.preset, f"one of {[*PRESETS]}")
        if self.hf:
            _expect(self.model == BYTE_MOE, "model", self.model, "nothing beside --hf")
        else:
            self._check_sizes(world_size)
        _expect(
            self.batch % world_size == 0,
            "batch",
            self.batch,
            f"a multiple of the number of ranks, {world_size}",
        )
        _expect(
            self.eval_windows % world_size == 0,
            "eval_windows",
            self.eval_windows,
            f"a multiple of the number of ranks, {world_size}",
        )
        ep = self.ep or world_size
        _expect(
            world_size % ep == 0,
            "ep",
            self.ep,
            f"a divisor of the number of ranks, {world_size}",
        )

    def _check_sizes(self, world_size: int) -> None:
        """Raise UsageError if sizes do not fit together, or do not fit the ranks."""
        _expect(
            self.top_k <= self.num_experts,
            "top_k",
            self.top_k,
            f"at most --num-experts {self.num_experts}",
        )
        _expect(
            self.dim % (2 * self.heads) == 0,
            "dim",
            self.dim,
            f"a multiple of 2 * --heads = {2 * self.heads}",
        )
        ep = self.ep or world_size
        efsdp = world_size // ep
        if world_size % ep or efsdp == 1:
            return
        # FSDP shards each expert over the ranks beside ep: evenly, and it must
        # find an expert on every rank.
        for name in ("dim", "expert_dim"):
            _expect(
                getattr(self, name) % efsdp == 0,
                name,
                getattr(self, name),
                f"a multiple of ranks / --ep = {efsdp}",
            )
        _expect(
            -(-self.num_experts // ep) * (ep - 1) < self.num_experts,
            "num_experts",
            self.num_experts,
            f"enough that each of --ep {ep} ranks owns one of the pieces of "
            f"{-(-self.num_experts // ep)}",
        )


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _expect(ok: bool, name: str, got: object, expected: str) -> None:
    if not ok:
        raise UsageError(f"{_flag(name)} is {got}, expected {expected}")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of ``TrainConfig``."""
    for option in fields(TrainConfig):
        metadata = dict(option.metadata)
        text = metadata.pop("help")
        if isinstance(option.default, bool):
            parser.add_argument(_flag(option.name), action="store_true", help=text)
            continue
        default = option.default
        if option.name in ModelConfig.__annotations__:
            default = None
            by_preset = [getattr(sizes, option.name) for sizes in PRESETS.values()]
            text += f" (default: {', '.join(map(str, by_preset))}, by --preset)"
        if option.default != "" and "default" not in text:
            shown = (
                repr(option.default) if " " in str(option.default) else option.default
            )
            text += f" (default: {shown})"
        if "choices" not in metadata:
            metadata.setdefault("metavar", _METAVARS[type(option.default)])
        parser.add_argument(
            _flag(option.name),
            type=type(option.default),
            default=default,
            help=text,
            **metadata,
        )


def config_from_args(args: argparse.Namespace) -> TrainConfig:
    """Pick the fields of ``TrainConfig`` out of parsed arguments."""
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    sizes = asdict(PRESETS[args.preset])
    values |= {name: sizes[name] for name in sizes if values[name] is None}
    return TrainConfig(**values)
