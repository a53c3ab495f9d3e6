"""Model facts: what the planner knows about a model. `Transformer` describes one in pure data, when none is at hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

from shardwise.errors import UserError

_HELP = (
    "write gpt:layers=24,hidden=2048 and, where they differ from the default, heads, kv_heads, ffn, gated, vocab, tied, "
    "experts, experts_per_token, seq"
)


MOST_LAYERS = 100_000
"""More than any model has; it bounds the loops over stages."""


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A decoder-only transformer as pure data: enough for its parameters, FLOPs and activations.

    Attributes:
        layers: transformer blocks.
        hidden: width of the residual stream.
        heads: query heads.
        kv_heads: key and value heads (fewer than `heads` with grouped queries).
        ffn_hidden: inner width of the feed-forward part, of one expert when there are experts.
        gated_ffn: three matrices (gate, up, down) instead of two; stands for the llama family (RMS norms, rotary
            positions, no biases).
        vocab: rows of the embedding.
        tied_embeddings: the output projection is the embedding.
        experts: experts per layer; 0 is a dense model.
        experts_per_token: experts each token visits.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    gated_ffn: bool = False
    vocab: int = 51200
    tied_embeddings: bool = True
    experts: int = 0
    experts_per_token: int = 0

    _KEYS: ClassVar[Mapping[str, str]] = {"ffn": "ffn_hidden", "gated": "gated_ffn", "tied": "tied_embeddings"}

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn_hidden", "vocab"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"transformer {name}={value!r}: it must be a whole number of at least 1")
        if self.layers > MOST_LAYERS:
            raise UserError(f"transformer layers={self.layers}: there may be at most {MOST_LAYERS:,}")
        if self.experts < 0 or not 0 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"transformer experts={self.experts}, experts_per_token={self.experts_per_token}: a token visits between 1 "
                "and all of the experts; a dense model has 0 of both"
            )
        if self.experts and not self.experts_per_token:
            raise UserError(f"transformer experts={self.experts}: also give experts_per_token")

    @classmethod
    def parse(cls, text: str) -> "tuple[Transformer, int]":
        """Read `gpt:layers=96,hidden=12288,heads=96,seq=2048,vocab=51200` as a transformer and its sequence length.

        `llama:` instead of `gpt:` changes the defaults: gated feed-forward part, untied embeddings, vocab 32000.

        Raises:
            UserError: an unknown family or key, or a value that is not a whole number.
        """
        family, colon, body = text.strip().partition(":")
        family = family.strip().lower()
        if family not in ("gpt", "llama") or not colon:
            raise UserError(f"model {text!r}: the family must be gpt or llama; {_HELP}")
        values: dict[str, int] = {}
        known = {item.name for item in fields(cls)} | set(cls._KEYS) | {"seq"}
        for part in filter(None, (piece.strip() for piece in body.split(","))):
            key, _, number = (piece.strip() for piece in part.partition("="))
            name = cls._KEYS.get(key, key)
            if key not in known or name in values:
                raise UserError(f"model {text!r}: {part!r} is unknown or given twice; {_HELP}")
            if not number.isdecimal():
                raise UserError(f"model {text!r}: {number!r} for {key} is no whole number; {_HELP}")
            values[name] = int(number)
        made = cls.from_values(values, gated=family == "llama")
        if "heads" in values and made.hidden % made.heads:
            raise UserError(f"model {text!r}: heads={made.heads} must divide hidden={made.hidden}")
        if made.heads % made.kv_heads:
            raise UserError(f"model {text!r}: kv_heads={made.kv_heads} must divide heads={made.heads}")
        seq_len = values.get("seq", 2048)
        if seq_len < 1:
            raise UserError(f"model {text!r}: seq={seq_len}: it must be at least 1")
        return made, seq_len

    @classmethod
    def from_values(cls, values: Mapping[str, int], *, gated: bool = False) -> "Transformer":
        """A transformer from what is known; blanks get the usual ratios.

        heads = hidden / 128; kv_heads = heads; ffn = 4 hidden, or 8/3 hidden rounded up to 256 when gated.
        """
        missing = [name for name in ("layers", "hidden") if name not in values]
        if missing:
            raise UserError(f"model: {missing[0]} is missing; {_HELP}")
        hidden = values["hidden"]
        gated = bool(values.get("gated_ffn", gated))
        heads = values.get("heads", max(1, hidden // 128))
        experts = values.get("experts", 0)
        return cls(
            layers=values["layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=values.get("kv_heads", heads),
            ffn_hidden=values.get("ffn_hidden", 256 * math.ceil(8 * hidden / 768) if gated else 4 * hidden),
            gated_ffn=gated,
            vocab=values.get("vocab", 32000 if gated else 51200),
            tied_embeddings=bool(values.get("tied_embeddings", not gated)),
            experts=experts,
            experts_per_token=values.get("experts_per_token", min(2, experts)),
        )

    @cached_property
    def head_dim(self) -> int:
        """Width of one head."""
        return max(1, self.hidden // self.heads)

    @cached_property
    def kv_hidden(self) -> int:
        """Width of all keys (or values) of one token."""
        return self.head_dim * self.kv_heads

    @cached_property
    def attention_parameters(self) -> int:
        """Query, key, value and output matrices of one layer."""
        return 2 * self.hidden * self.head_dim * self.heads + 2 * self.hidden * self.kv_hidden

    @cached_property
    def expert_parameters(self) -> int:
        """Feed-forward matrices of one layer, of one expert when there are experts."""
        return (3 if self.gated_ffn else 2) * self.hidden * self.ffn_hidden

    @cached_property
    def small_parameters(self) -> int:
        """Norms and biases of one layer: two norms; with `gpt` also their shifts and the four biases."""
        if self.gated_ffn:
            return 2 * self.hidden
        return 4 * self.hidden + 2 * self.hidden + 2 * self.kv_hidden + self.ffn_hidden + self.hidden

    @cached_property
    def dense_layer_parameters(self) -> int:
        """Parameters of one layer outside the experts."""
        router = self.hidden * self.experts
        return (
            self.attention_parameters + self.small_parameters + router + (0 if self.experts else self.expert_parameters)
        )

    @cached_property
    def layer_parameters(self) -> int:
        """All parameters of one layer."""
        return self.dense_layer_parameters + self.experts * self.expert_parameters

    @cached_property
    def embedding_parameters(self) -> int:
        """The embedding matrix; an untied output projection is as large again."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model without learned positions."""
        return self.layers * self.layer_parameters + (1 if self.tied_embeddings else 2) * self.embedding_parameters

    def forward_flops(self, seq_len: int) -> float:
        """FLOPs of the forward pass of one sequence: two per multiply-add; causal attention counted as half."""
        ffn = self.expert_parameters * max(1, self.experts_per_token)
        matrices = 2.0 * (self.attention_parameters + ffn + self.hidden * self.experts) * seq_len
        attention = 2.0 * seq_len * seq_len * self.hidden
        return self.layers * (matrices + attention) + 2.0 * seq_len * self.embedding_parameters

    def __str__(self) -> str:
        kind = "llama" if self.gated_ffn else "gpt"
        billions = self.parameters / 1e9
        size = f"{billions / 1e3:.3g}T parameters" if billions >= 1e3 else f"{billions:.3g}B parameters"
        return f"{kind} with {self.layers} layers of width {self.hidden}, {size}"


@dataclass(frozen=True, kw_only=True)
class BlockFacts:
    """One part of a model that is computed as a whole and between whose neighbours the model can be cut.

    All figures are for one sample unless they say otherwise.

    Attributes:
        name: dotted name of the module.
        parameters: trained values; frozen ones count in `frozen_parameters`.
        forward_flops, backward_flops: floating-point operations.
        forward_bytes: bytes read and written by the forward pass, weights once per pass excluded.
        saved_bytes: activations kept for the backward pass.
        output_bytes: what a cut after this block has to send.
        kernels: device operations launched by the forward pass.
        tensor_fraction: share of the parameters that tensor parallelism can split.
        repeats: equal blocks in a row.
        stochastic: draws random numbers; `batch_coupled`: mixes samples of a batch.
    """

    name: str
    parameters: int
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    saved_bytes: float
    output_bytes: float
    kernels: int = 1
    frozen_parameters: int = 0
    tensor_fraction: float = 0.0
    repeats: int = 1
    stochastic: bool = False
    batch_coupled: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A whole model, block by block, in the order of execution."""

    name: str
    blocks: tuple[BlockFacts, ...]
    tied_groups: tuple[tuple[str, ...], ...] = ()
    origin: str = "counted"
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def parameters(self) -> int:
        """Trained parameters of all blocks."""
        return sum(block.parameters * block.repeats for block in self.blocks)

    @property
    def forward_flops(self) -> float:
        """FLOPs of the forward pass of one sample."""
        return sum(block.forward_flops * block.repeats for block in self.blocks)

    @property
    def repeated(self) -> tuple[tuple[str, ...], ...]:
        """Names of equal blocks in a row: same parameters, FLOPs, kept bytes and operations."""

        def alike(block: BlockFacts) -> tuple[object, ...]:
            return block.parameters, round(block.forward_flops), round(block.saved_bytes), block.kernels

        groups = [tuple(block.name for block in group) for _, group in groupby(self.blocks, key=alike)]
        return tuple(group for group in groups if len(group) > 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return {
            "name": self.name,
            "origin": self.origin,
            "notes": list(self.notes),
            "tied_groups": [list(group) for group in self.tied_groups],
            "blocks": [{item.name: getattr(block, item.name) for item in fields(block)} for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "ModelFacts":
        """Build facts from plain data.

        Raises:
            UserError: a part is missing or unknown.
        """
        try:
            return cls(
                name=record["name"],
                origin=record.get("origin", "counted"),
                notes=tuple(record.get("notes", ())),
                tied_groups=tuple(tuple(group) for group in record.get("tied_groups", ())),
                blocks=tuple(BlockFacts(**block) for block in record["blocks"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(
                f"model facts: {error}; `shardwise plan` counts them again when the file is removed"
            ) from error
