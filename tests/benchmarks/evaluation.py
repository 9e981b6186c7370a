"""Suites answered by mlx_lm.generate, prompt after prompt, and by the harness, in one process.

Same float32 weights, BLAS, prompts of token ids, limits and stop tokens, so that only the harness
differs. Three jobs: the quickstart's two suites, and the first of these with a system prompt of a
few hundred tokens before each question. Says seconds of wall and of processor time a sample and
their ratios, and compares the greedy answers; for each that differs it says how near the two best
tokens are where they part (round-off differs with the size of a batch).

Usage: python -m tests.benchmarks.evaluation [--alone 0] [--batch-size 32] [--out bench.json]
`--alone N` asks only every so manieth prompt one by one, N in all (0: each of them).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx_ft  # noqa: F401  # first: it loads OpenBLAS before mlx is imported
from mlx_ft.evaluate.suites import Suite, load_suites

MODEL = "smollm2-135m-instruct"
SUITES = ("evals/code_mode.yaml", "evals/keep_talking.yaml")
# What greedy decoding may decide either way: a float32 sum over a vocabulary in another order.
NEAR_TIE_NATS = 1e-3


@dataclass(frozen=True)
class Difference:
    """Two answers to one prompt that part at a token, and the two best tokens' gap there, nats."""

    sample: str
    position: int
    gap_nats: float

    @property
    def reason(self) -> str:
        return "near tie" if self.gap_nats < NEAR_TIE_NATS else "NOT a near tie"


@dataclass(frozen=True)
class Measured:
    """One job: seconds a sample, one by one (`alone`) and by the harness, and what differs."""

    job: str
    samples: int
    alone_samples: int
    prompt_tokens: float
    generated_tokens: float
    alone_seconds: float
    seconds: float
    alone_cpu_seconds: float
    cpu_seconds: float
    differences: tuple[Difference, ...]

    @property
    def line(self) -> str:
        return (
            f"{self.job}: {self.alone_seconds / self.seconds:.1f} times the samples a second "
            f"({self.alone_seconds:.2f} s a sample one by one, {self.seconds:.3f} s here), "
            f"{self.alone_cpu_seconds / self.cpu_seconds:.1f} times by processor time; "
            f"{self.alone_samples - len(self.differences)} of {self.alone_samples} answers equal"
        )


def with_system_prompt(suite: Suite) -> Suite:
    """Return the suite with the same long system prompt before every question."""
    tools = "\n".join(
        f"- {name}({', '.join(names)}): look at the {name.replace('_', ' ')} of what is named by "
        f"{' and '.join(names)}, and return it as text, or an empty text where there is none."
        for name, names in suite.scorer_config["tools"].items()
    )
    system = {"role": "system", "content": f"You help with code. Your functions are:\n{tools}"}
    samples = tuple(
        replace(sample, messages=(system, *sample.messages)) for sample in suite.samples
    )
    return replace(suite, name=f"{suite.name} with a system prompt", samples=samples)


def measure(loaded: Any, suite: Suite, arguments: argparse.Namespace, tokenizer: Any) -> Measured:
    """Answer one suite both ways."""
    import mlx_lm

    from mlx_ft.engine.generate import generate
    from mlx_ft.evaluate.harness import questions_of

    prompts = [list(question.ids or ()) for question in questions_of(suite, loaded.renderer)]
    count = arguments.alone or len(prompts)
    picked = sorted({index * len(prompts) // count for index in range(min(count, len(prompts)))})
    # Both once before the clock runs: kernels are compiled, pages of the weights read.
    mlx_lm.generate(loaded.model, tokenizer, prompts[0], max_tokens=4)
    generate(loaded, prompts[:2], max_tokens=4)
    started, cpu = time.perf_counter(), time.process_time()
    alone = {
        index: mlx_lm.generate(loaded.model, tokenizer, prompts[index], max_tokens=suite.max_tokens)
        for index in picked
    }
    alone_seconds, alone_cpu = time.perf_counter() - started, time.process_time() - cpu
    started, cpu = time.perf_counter(), time.process_time()
    answers = generate(
        loaded, prompts, max_tokens=suite.max_tokens, batch_size=arguments.batch_size
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    differences = [
        difference(loaded, suite.samples[index].id, prompts[index], answers[index].ids, tokenizer)
        for index, text in alone.items()
        if loaded.renderer.decode_raw(answers[index].ids) != text
    ]
    return Measured(
        job=suite.name,
        samples=len(prompts),
        alone_samples=len(picked),
        prompt_tokens=sum(map(len, prompts)) / len(prompts),
        generated_tokens=sum(len(answer.ids) for answer in answers) / len(answers),
        alone_seconds=alone_seconds / len(picked),
        seconds=seconds / len(prompts),
        alone_cpu_seconds=alone_cpu / len(picked),
        cpu_seconds=cpu_seconds / len(prompts),
        differences=tuple(differences),
    )


def difference(
    loaded: Any, sample: str, prompt: list[int], ours: tuple[int, ...], tokenizer: Any
) -> Difference:
    """Return where an answer leaves what is said one by one, and how near the best two were."""
    import mlx.core as mx
    from mlx_lm import stream_generate

    said = stream_generate(loaded.model, tokenizer, prompt, max_tokens=len(ours) + 1)
    theirs = [int(response.token) for response in said]
    pairs = enumerate(zip(ours, theirs, strict=False))
    position = next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    logits = loaded.model(mx.array([[*prompt, *theirs[:position]]]))[0, -1]
    best: Any = mx.sort(logits)[-2:].tolist()
    return Difference(sample, position, float(best[1]) - float(best[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alone", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    from mlx_lm.utils import load_tokenizer

    from mlx_ft.engine.load import load_model
    from mlx_ft.model.chat import ChatFormat
    from mlx_ft.model.resolve import resolve_model
    from mlx_ft.system.console import Console

    folder = resolve_model(MODEL, None, Console()).path
    loaded = load_model(folder, ChatFormat())
    tokenizer = load_tokenizer(folder, {}, eos_token_ids=sorted(loaded.renderer.stop_ids))
    suites = load_suites([Path(name) for name in SUITES])
    found = []
    for suite in (*suites, with_system_prompt(suites[0])):
        found.append(measure(loaded, suite, arguments, tokenizer))
        print(found[-1].line, flush=True)
        for each in found[-1].differences:
            print(
                f"  {each.sample}: from token {each.position}, {each.reason}, {each.gap_nats:.2g}"
            )
    if arguments.out:
        document = {"compute": loaded.compute, "jobs": [asdict(each) for each in found]}
        arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
