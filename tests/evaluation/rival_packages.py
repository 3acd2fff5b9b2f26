"""Packages of other work with the signatures and layouts of their sources, dense inside.

Each is a file that is written where Python finds it. What a real one keeps is left out: given the
right tensors in the right layout at the right scale, all of them return causal attention.
"""

from __future__ import annotations

from pathlib import Path

DENSE = '''
import math
import torch


def dense(query, key, value, scale, mask=None):
    """[B, H, S, D] with as many heads everywhere."""
    assert query.shape[1] == key.shape[1] == value.shape[1], "heads"
    rows = torch.arange(query.shape[2], device=query.device)
    causal = rows[:, None] >= torch.arange(key.shape[2], device=query.device)
    logits = query.float() @ key.float().transpose(-1, -2) * scale
    keep = causal if mask is None else causal & mask
    weights = logits.masked_fill(~keep, -math.inf).softmax(-1)
    return (weights @ value.float()).to(query.dtype)


def grouped(query, key):
    """[B, S, Hkv, D] for the heads of [B, S, Hq, D]."""
    return key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
'''
SOURCES = {
    "dense_inside.py": DENSE,
    "minference/__init__.py": """
from dense_inside import dense
import torch

__version__ = "0.1.6"


def vertical_slash_sparse_attention(
    query, key, value, v_idx, s_idx, block_size_M=64, block_size_N=64
):
    length = query.shape[2]
    rows = torch.arange(length)
    columns = torch.zeros(*query.shape[:2], length, dtype=torch.bool).scatter(-1, v_idx, True)
    distances = torch.zeros_like(columns).scatter(-1, s_idx, True)
    back = (rows[:, None] - rows).clamp(min=0)
    mask = columns[:, :, None, :] | distances[:, :, back]
    return dense(query, key, value, query.shape[-1] ** -0.5, mask)
""",
    "flex_prefill/__init__.py": "",
    "flex_prefill/ops/__init__.py": "",
    "flex_prefill/ops/flex_prefill_attention.py": """
from dense_inside import dense, grouped


def flex_prefill_attention(
    q,
    k,
    v,
    gamma,
    tau=0,
    min_budget=None,
    max_budget=None,
    gqa_interleave=False,
    softmax_scale=None,
    block_size=128,
    return_computational_ratio=False,
):
    batch_size, q_len, num_q_heads, head_dim = q.shape
    batch_size, k_len, num_kv_heads, head_dim = k.shape
    assert batch_size == 1, "only support batch size 1 for now"
    assert q.shape[1] == k.shape[1]
    assert head_dim in {16, 32, 64, 128}
    assert block_size in {16, 32, 64, 128}
    assert not gqa_interleave and 0 < gamma < 1 and 0 <= tau <= 1 and min_budget > 0
    tensors = (tensor.transpose(1, 2) for tensor in (q, grouped(q, k), grouped(q, v)))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    return dense(*tensors, scale).transpose(1, 2)
""",
    "xattn/src/Xattention.py": """
from dense_inside import dense

print("imported")


def Xattention_prefill(
    query_states,
    key_states,
    value_states,
    stride,
    norm=1,
    threshold=0.8,
    block_size=128,
    use_triton=True,
    causal=True,
    kdb=1,
    chunk_size=None,
    keep_sink=False,
    keep_recent=False,
):
    batch_size, num_heads, k_len, head_dim = key_states.shape
    assert block_size == 128 and batch_size == 1 and causal and stride in (4, 8, 16)
    print("approximated prefilling Computation: 1.0")
    return dense(query_states, key_states, value_states, head_dim**-0.5)
""",
    "flash_prefill/__init__.py": """
from dense_inside import dense, grouped


def flash_prefill(
    q, k, v, out, block_size, attention_sink, window_size, alpha, last_n_block_full, min_budget
):
    assert out.shape == q.shape and out.is_contiguous()
    assert (block_size, attention_sink, window_size) == (128, 2, 4)
    tensors = (tensor.transpose(1, 2) for tensor in (q, grouped(q, k), grouped(q, v)))
    out.copy_(dense(*tensors, q.shape[-1] ** -0.5).transpose(1, 2))
""",
    "spas_sage_attn/__init__.py": """
from dense_inside import dense
import torch


def spas_sage2_attn_meansim_topk_cuda(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    smooth_k=True,
    simthreshd1=-0.1,
    cdfthreshd=None,
    topk=0.35,
    pvthreshd=50,
    attention_sink=False,
    tensor_layout="HND",
    output_dtype=torch.float16,
    return_sparsity=False,
    return_lse=False,
):
    assert tensor_layout == "HND" and q.size(-2) >= 128 and is_causal
    return dense(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
""",
    "flashinfer/__init__.py": '''
import torch


class VariableBlockSparseAttentionWrapper:
    def __init__(self, float_workspace_buffer, backend="auto"):
        assert float_workspace_buffer.dtype == torch.uint8

    def plan(
        self,
        block_mask_map,
        block_row_sz,
        block_col_sz,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        logits_soft_cap=None,
        sm_scale=None,
        rope_scale=None,
        rope_theta=None,
        non_blocking=True,
        q_data_type="float16",
        kv_data_type=None,
    ):
        assert block_mask_map.dtype == torch.bool
        assert block_row_sz.shape == block_mask_map.shape[:2]
        assert block_col_sz.shape == (block_mask_map.shape[0], block_mask_map.shape[2])
        assert num_kv_heads == block_mask_map.shape[0] and num_qo_heads % num_kv_heads == 0
        assert causal and sm_scale is not None
        self.map, self.rows, self.columns = block_mask_map, block_row_sz, block_col_sz
        self.scale, self.heads, self.dtype = sm_scale, num_qo_heads, q_data_type

    def run(self, q, k, v):
        """Every row of blocks is a request with the kept blocks gathered before it."""
        assert q.shape[0] == self.heads and k.shape == v.shape and q.dtype == self.dtype
        out = torch.empty_like(q)
        for head in range(q.shape[0]):
            kv = head * k.shape[0] // self.heads
            ends, starts = self.rows[kv].cumsum(0), self.columns[kv].cumsum(0) - self.columns[kv]
            for row, end in enumerate(ends.tolist()):
                first = end - int(self.rows[kv, row])
                kept = [
                    torch.arange(int(starts[c]), int(starts[c] + self.columns[kv, c]))
                    for c in self.map[kv, row].nonzero().flatten().tolist()
                ]
                index = torch.cat(kept)
                logits = q[head, first:end].float() @ k[kv, index].float().T * self.scale
                ahead = len(index) - (end - first)
                seen = torch.ones_like(logits, dtype=torch.bool).tril(ahead)
                weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
                out[head, first:end] = (weights @ v[kv, index].float()).to(q.dtype)
        return out
''',
}


def write_packages(folder: Path) -> None:
    """Writes the packages into a folder."""
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source.lstrip())
