r"""Sample several answers per prompt from a model behind an OpenAI-compatible server (vLLM, `transformers serve`), as a
CSV whose column `label` is empty: fill it in, and train on it.

    vllm serve Qwen/Qwen3-0.6B --port 8000
    python examples/scripts/sample_answers.py \
        --server_url http://localhost:8000/v1 --model Qwen/Qwen3-0.6B \
        --prompts prompts.txt --answers 4 --output to_rate.csv

`prompts.txt` has one prompt per line. Answers of one prompt differ by their seed, if the server takes one.
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

from trl_ulma.evaluation.server import Refusal, Reply, Server, ServerError


def sample(server: Server, prompts: list[str], answers: int, **sampling: float) -> list[tuple[str, str]]:
    """(prompt, answer) of all answers that are finished, in the order of the prompts. The others are counted."""
    replies: dict[tuple[int, int], Reply] = {}
    lost: Counter[str] = Counter()

    def ask(which: tuple[int, int]) -> None:
        number, seed = which
        try:
            reply = server.ask([{"role": "user", "content": prompts[number]}], seed=seed, **sampling)
        except Refusal as refusal:
            lost[str(refusal)] += 1
            return
        if reply.refused is not None:
            lost[str(reply.refused)] += 1
        elif not reply.finished:
            lost["cut off at max_tokens"] += 1
        elif not reply.text.strip():
            lost["empty"] += 1
        else:
            replies[which] = reply

    server.each(ask, [(number, seed) for number in range(len(prompts)) for seed in range(answers)])
    found = [(prompts[number], replies[number, seed].text) for number, seed in sorted(replies)]
    once = list(dict.fromkeys(found))  # the same answer is rated once
    lost["equal to another answer to the prompt"] = len(found) - len(once)
    if len(once) < len(found) and len(once) == len({prompt for prompt, _ in once}):
        print(
            "All answers to a prompt are equal, so the server does not sample. `transformers serve` only does if the "
            'checkpoint\'s generation_config.json has "do_sample": true.',
            file=sys.stderr,
        )
    for why, count in lost.items():
        if count:
            print(f"{count} of {len(prompts) * answers} answers left out: {why}", file=sys.stderr)
    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server_url", required=True, help="such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--prompts", required=True, type=Path, help="text file with one prompt per line")
    parser.add_argument("--answers", type=int, default=4, help="answers per prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--output", required=True, type=Path, help="CSV with prompt, completion and an empty label")
    args = parser.parse_args()
    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        sys.exit(f"{args.prompts} has no prompt. Write one per line.")
    try:
        server = Server(args.model, args.server_url)
        server.check()
        rows = sample(server, prompts, args.answers, temperature=args.temperature, max_tokens=args.max_tokens)
    except ServerError as error:
        sys.exit(str(error))
    with args.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "completion", "label"])
        writer.writerows([*row, ""] for row in rows)
    answers = f"{len(rows)} answer{'' if len(rows) == 1 else 's'}"
    print(f"{answers} to {len(prompts)} prompts in {args.output}. Fill in the column label.")


if __name__ == "__main__":
    main()
