"""Why attention goes to the parent, unchanged."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why an engine, a layer, a row or a call stays with the parent backend."""

    # The engine.
    NO_SETTINGS = "no settings: additional_config has no 'unisparse' (on the CPU they are needed)"
    CONTEXT_PARALLEL = "ranks share a sequence (decode or prefill context parallel)"
    KV_TRANSFER = "a connector writes keys into the cache that no layer computed"
    # A layer.
    EXCLUDED = "layer excluded by dense_layers"
    CALIBRATED = "layer that is dense in the calibration, or not in it"
    NOT_DECODER = "encoder or cross-attention"
    SLIDING_WINDOW = "sliding window or local attention"
    ALIBI = "ALiBi"
    SOFT_CAP = "soft cap on the logits"
    SINKS = "attention sinks"
    QUANTIZED_CACHE = "quantised cache"
    SHARED_CACHE = "layer that reads another layer's cache"
    DTYPE = "queries and cache differ in dtype, or are not 16- or 32-bit floating"
    HEADS = "c_h does not divide the query heads of a key head"
    SELECTOR = "selector that is not defined for a part of a prompt"
    PAGE_SIZE = "block_size of the selector is no multiple of a page; set --block-size to it"
    DECODE_PAGE = "pages of fewer than 64 keys, whose summaries would take too much"
    LAYOUT = "a layout of the cache that cannot be read by pages of one head"
    # A row of a batch.
    DECODE = "decoding, or fewer queries than a block"
    FEW_KEYS = "decoding over so few keys that choosing pages saves nothing"
    VERIFICATION = "not prefilling: rows that verify drafts"
    SHORT = "fewer keys than min_length"
    SLOWER = "the cost model predicts that the parent is faster"
    KEEPS_MOST = "nine tenths of the blocks or more are expected to be kept"
    CASCADE = "cascade attention: the batch shares a prefix"
    NOT_CAUSAL = "not causal"
    PREFIX_IMAGES = "bidirectional ranges (prefix LM), or reference windows"
    SPLIT_BATCH = "a batch whose lengths are not known on the host"
    # A call.
    QUANTIZED_OUTPUT = "fused quantisation of the output"

    @property
    def is_refusal(self) -> bool:
        """Whether it holds whatever the settings and the lengths are."""
        return self not in _CHOICES


# What the settings say, and rows that are too short to gain.
_CHOICES = {
    Reason.NO_SETTINGS,
    Reason.EXCLUDED,
    Reason.CALIBRATED,
    Reason.DECODE,
    Reason.FEW_KEYS,
    Reason.SHORT,
    Reason.SLOWER,
    Reason.KEEPS_MOST,
}
