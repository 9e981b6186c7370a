"""Where the checkout lies, and what stands beside it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVALS = ROOT / "evals"
RECIPES = ROOT / "recipes"
QUICKSTART = RECIPES / "data" / "code_mode"
# Real Qwen3 and Llama 3.1 tokenizers; tests that use them skip where the folder is absent.
TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
