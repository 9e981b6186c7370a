"""llama.cpp loads the GGUF, reads the same ids from a text, and computes the same as MLX.

Run by `make test-clients`, which installs a prebuilt llama.cpp (node-llama-cpp) into .clients.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as mlx_lm_load_model

from mlx_ft.engine.generate import Generation, generate
from mlx_ft.engine.load import load_model
from mlx_ft.export.fuse import QUANTIZATION_KEYS
from mlx_ft.export.gguf import write_gguf
from mlx_ft.export.model_folder import write_model_folder
from mlx_ft.model.chat import CANONICAL_CONVERSATIONS, ChatFormat, ChatRenderer, RowRefused
from tests.support.gguf_models import CONFIGS, PATCHED, patch_tokenizer
from tests.support.models import TINY_CONFIGS, write_random_weights
from tests.support.paths import ROOT
from tests.support.tokenizers import SENTENCEPIECE_TOKENS, write_tiny_sentencepiece

pytestmark = pytest.mark.clients

LIBRARY = ROOT / ".clients" / "node_modules" / "node-llama-cpp" / "dist" / "index.js"
SHARED_TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
DATE = "2025-01-01"
MAX_TOKENS = 64
ANSWERS_COMPARED = 20
ANSWERS_EQUAL_AT_LEAST = 18
# Half the sum of differences between two distributions; llama.cpp keeps keys and values in
# float16, and sums in another order.
LARGEST_DISTANCE = 0.02
TEXTS = [
    "Hello",
    "  two  spaces, a tab\tand\n\n\nnew lines \n end ",
    "It's 12345 + 6.7e-8, isn't it? I'LL SAY: we've (done) [it]!",
    "Zwölf Boxkämpfer jagen Eva über den Sylter Deich. 日本語のテキスト 🦊👩‍👧",
    "a tan man and the capital of thanks",
    'execute_code("""read_file(path="src/main.py")""")',
]


@dataclass(frozen=True)
class Answers:
    """What llama.cpp said; see llama_cpp.mjs."""

    tokenized: list[list[int]]
    stops: list[bool]
    template: str
    generated: list[list[int]]
    probabilities: list[dict[int, float]]


def ask(file: Path, **questions: Any) -> Answers:
    job = {"package_file": str(LIBRARY), "model": str(file), "context_tokens": 512, "threads": 1}
    asked = {"texts": [], "stop_ids": [], "prompts": [], "probes": [], "max_tokens": MAX_TOKENS}
    job_file, answers_file = file.with_suffix(".job.json"), file.with_suffix(".answers.json")
    job_file.write_text(json.dumps(job | asked | questions), encoding="utf-8")
    script = Path(__file__).with_name("llama_cpp.mjs")
    done = subprocess.run(
        ["node", str(script), str(job_file), str(answers_file)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    said = json.loads(answers_file.read_text(encoding="utf-8"))
    said["probabilities"] = [dict(pairs) for pairs in said["probabilities"]]
    return Answers(**said)


@pytest.fixture(scope="session", autouse=True)
def llama_cpp() -> None:
    if not LIBRARY.exists():
        pytest.fail(f"{LIBRARY} is not there: run `make test-clients`")


def distance(ours: np.ndarray, theirs: dict[int, float]) -> float:
    found = np.zeros_like(ours)
    for token, probability in theirs.items():
        found[token] = probability
    return float(np.abs(ours - found).sum() / 2)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_llama_cpp_computes_what_mlx_does(tmp_path: Path, name: str) -> None:
    """Random models with random norms and biases, and prompts longer than Gemma's window."""
    folder = write_random_weights(tmp_path / "model", CONFIGS[name])
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    generator = np.random.default_rng(1)
    probes = [generator.integers(3, 300, size=length).tolist() for length in (1, 2, 7, 40, 90)]
    answers = ask(tmp_path / "tiny.gguf", probes=probes)
    loaded = load_model(folder, ChatFormat(date=DATE))
    distances = []
    for probe, theirs in zip(probes, answers.probabilities, strict=True):
        logits = loaded.model(mx.array([probe]))[0, -1].astype(mx.float32)
        distances.append(distance(np.array(mx.softmax(logits)), theirs))
    print(f"{name}: largest distance {max(distances):.5f}")
    assert max(distances) < LARGEST_DISTANCE


def compare_tokens(folder: Path, file: Path) -> None:
    """Every text and every canonical conversation becomes the same ids, every stop id stops."""
    renderer = ChatRenderer.from_folder(folder, ChatFormat(date=DATE))
    rendered = []
    for messages in [*CANONICAL_CONVERSATIONS, *([{"role": "user", "content": t}] for t in TEXTS)]:
        try:
            rendered.append(renderer._render(messages, None, add_generation_prompt=True))
        except RowRefused:  # a template without system turns
            continue
    assert len(rendered) >= len(TEXTS) + 2
    stops = sorted(renderer.stop_ids)
    answers = ask(file, texts=rendered, stop_ids=[*stops, stops[0] + 40])
    expected = [renderer._encode(text) for text in rendered]
    assert answers.tokenized == expected
    assert answers.stops == [True] * len(stops) + [False]
    assert answers.template == renderer.tokenizer.chat_template


@pytest.mark.parametrize(
    ("steps", "ignore_merges"),
    [([], False), (["digits"], False), ([r"\p{N}"], False), ([r"\p{N}{1,3}"], True)],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe"],
)
def test_byte_level_ids(tmp_path: Path, steps: list[str], ignore_merges: bool) -> None:
    folder = write_random_weights(tmp_path / "model", PATCHED)
    patch_tokenizer(folder, steps, ignore_merges)
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    compare_tokens(folder, tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kind", ["gemma", "llama", "mistral"])
def test_sentencepiece_ids(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_sentencepiece(tmp_path / "model", kind)
    write_random_weights(folder, TINY_CONFIGS["llama"] | {"vocab_size": SENTENCEPIECE_TOKENS})
    write_gguf(folder, tmp_path / "tiny.gguf", "f16")
    compare_tokens(folder, tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("name", "config", "rows"), [("qwen3", "qwen3", 151_936), ("llama3_1", "llama", 128_256)]
)
def test_ids_of_real_tokenizers(tmp_path: Path, name: str, config: str, rows: int) -> None:
    if not (SHARED_TOKENIZERS / name).exists():
        pytest.skip(f"{SHARED_TOKENIZERS / name} is not there")
    folder = tmp_path / "model"
    folder.mkdir()
    for source in (SHARED_TOKENIZERS / name).iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    write_random_weights(folder, TINY_CONFIGS[config] | {"vocab_size": rows})
    write_gguf(folder, tmp_path / "tiny.gguf", "q8_0")
    compare_tokens(folder, tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def fused(builtin_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model, dequantized to float16, as the export writes it."""
    model, config = mlx_lm_load_model(builtin_model, lazy=True)
    model = dequantize_model(model)
    model.set_dtype(mx.float16)
    folder = tmp_path_factory.mktemp("smollm2") / "fused-f16"
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    write_model_folder(folder, builtin_model, model, plain, "# test\n")
    return folder


@dataclass(frozen=True)
class MlxAnswers:
    prompts: list[list[int]]
    answers: list[Generation]
    stop_ids: frozenset[int]


@pytest.fixture(scope="module")
def by_mlx(fused: Path) -> MlxAnswers:
    """Greedy answers to the first prompts of every evaluation file, in turn."""
    loaded = load_model(fused, ChatFormat(date=DATE))
    paths = sorted((ROOT / "evals").glob("*.jsonl"))
    files = [path.read_text(encoding="utf-8").splitlines() for path in paths]
    lines = [line for row in zip(*files, strict=False) for line in row][:ANSWERS_COMPARED]
    prompts = [loaded.renderer.prompt_ids(json.loads(line)["messages"]) for line in lines]
    assert len(prompts) == ANSWERS_COMPARED
    answers = generate(loaded, prompts, max_tokens=MAX_TOKENS)
    return MlxAnswers(prompts, answers, loaded.renderer.stop_ids)


@pytest.mark.model
@pytest.mark.parametrize(("kind", "at_least"), [("f16", ANSWERS_EQUAL_AT_LEAST), ("q8_0", 1)])
def test_the_built_in_model_answers_as_in_mlx(
    fused: Path, by_mlx: MlxAnswers, tmp_path: Path, kind: Any, at_least: int
) -> None:
    file = tmp_path / "smollm2.gguf"
    total_bytes = write_gguf(fused, file, kind)
    compare_tokens(fused, file)
    answers = ask(file, prompts=by_mlx.prompts, stop_ids=sorted(by_mlx.stop_ids))
    assert all(answers.stops)
    equal = stopped = 0
    for ours, theirs in zip(by_mlx.answers, answers.generated, strict=True):
        ended = theirs[-1] in by_mlx.stop_ids
        said = tuple(theirs[:-1] if ended else theirs)
        assert said and not by_mlx.stop_ids.intersection(said)
        equal += said == ours.ids and ended == (ours.finish_reason == "stop")
        stopped += ended
    print(
        f"{kind}: {total_bytes:,} bytes, {equal} of {len(by_mlx.answers)} greedy answers equal, "
        f"{stopped} ended by a stop token within {MAX_TOKENS} tokens"
    )
    assert stopped > 0 and equal >= at_least
