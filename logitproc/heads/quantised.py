"""Plain low-bit heads, the honest baselines: every row kept, in 8 or 4 bits, with nothing proved."""

from typing import Self

import torch
from torch import Tensor

from .head import Head, name_of, zeros

GROUP = 128  # columns that share a scale in 4 bits


class Int8Head(Head):
    """z = s_v (q_v . h), q = round(w / s) in [-127, 127], s = max |w_v| / 127: one scale a row.

    In bfloat16 on a CPU torch's packed kernel multiplies, where 64 divides d and 16 V; elsewhere rows are unpacked
    block by block, which is slow.
    """

    kind = "int8"
    quantised: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int, dtype: str = "float32"):
        super().__init__(in_features, out_features, dtype=dtype)
        self.register_buffer("quantised", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", zeros(out_features, dtype=dtype))

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Self:
        head = cls(weight.shape[1], weight.shape[0], name_of(weight.dtype)).to(weight.device)
        scales = (weight.float().abs().amax(1) / 127).to(weight.dtype)
        head.scales.copy_(scales.where(scales > 0, 1))
        for block in torch.arange(len(weight)).split(4096):
            q = (weight[block].float() / head.scales[block].float()[:, None]).round()
            head.quantised[block] = q.clamp(-127, 127).to(torch.int8)
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features)
        whole = self.in_features % 64 == 0 == self.out_features % 16  # other shapes crash the kernel
        if hidden.dtype is torch.bfloat16 and hidden.device.type == "cpu" and whole:
            logits = torch._weight_int8pack_mm(rows, self.quantised, self.scales)
        else:
            parts = [rows @ part.to(rows.dtype).T for part in self.quantised.split(4096)]
            logits = torch.cat(parts, -1) * self.scales
        return logits.reshape(*hidden.shape[:-1], -1)


class Int4Head(Head):
    """w = (q - 8) s + z, q in 0..15, scale and offset for each group of 128 columns (the whole row where d is less).

    For a CPU: torch's packed 4-bit kernel, whose arithmetic is bfloat16. 32 must divide d, and 16 V.
    """

    kind = "int4"
    packed: Tensor
    scales: Tensor

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        if in_features % 32 or out_features % 16:
            raise ValueError(
                f"The 4-bit kernel needs a hidden size that 32 divides and a vocabulary that 16 divides, got "
                f"{in_features} and {out_features}."
            )
        self.group = next(g for g in (GROUP, 64, 32) if in_features % g == 0)
        self.register_buffer("packed", torch.zeros(out_features, in_features // 2, dtype=torch.uint8))
        self.register_buffer("scales", zeros(in_features // self.group, out_features, 2, dtype="bfloat16"))

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor) -> Self:
        head = cls(weight.shape[1], weight.shape[0])
        parts = [_to_int4(rows.float(), head.group) for rows in weight.split(4096)]  # it packs 64 rows at a time
        head.packed = torch.cat([packed for packed, _ in parts])
        head.scales.copy_(torch.cat([scales for _, scales in parts], 1))
        return head

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features).bfloat16()
        logits = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.scales)
        return logits.reshape(*hidden.shape[:-1], -1).to(hidden.dtype)


def _to_int4(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(packed [n, d / 2], scales and offsets [d / group, n, 2]) of rows [n, d]."""
    groups = rows.unflatten(1, (-1, group))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16().float()
    offset = (low + 8 * scale).bfloat16().float()
    q = ((groups - offset[..., None]) / scale[..., None] + 8).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.flatten(1).int(), 1)
    return packed, torch.stack([scale, offset], -1).transpose(0, 1)
