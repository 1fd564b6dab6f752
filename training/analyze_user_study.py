# SPDX-License-Identifier: Apache-2.0
"""Analyze the answers of a study: preference rates with intervals, and a Bradley-Terry ranking of the systems.

    python training/analyze_user_study.py --key study/study.key.json --answers answers/*.json --output_dir study

Judges who fail the attention checks are left out and counted. All answers of a judge hang together, so intervals resample
judges; below ten of them they are Wilson's, which take answers for independent, and say so.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffsketching_pipeline.command_line import argument, parse_arguments, required, user_errors
from diffsketching_pipeline.evaluation.image_sets import write_text
from diffsketching_pipeline.evaluation.metrics import MIN_GROUPS, percentile_interval
from diffsketching_pipeline.stopping import stoppable


PSEUDO_WINS = 0.5
"""Added to both sides of every pair that was compared: a system that always wins would else be infinitely strong."""


@dataclass
class AnalysisArguments:
    """Arguments for the answers that are analyzed."""

    key: str = required("the key that make_user_study.py wrote beside the page")
    answers: list[str] = required("the files that the judges saved")
    output_dir: str = argument("study", "where `results.json` and `results.md` are written")
    min_attention: float = argument(0.75, "share of the attention checks' questions that a judge must answer rightly")
    num_bootstrap_samples: int = argument(1000, "resamples of the 95%% intervals")


class Vote(NamedTuple):
    """One answer: a judge preferred one system's photo to another's."""

    judge: int
    question: str
    winner: str
    loser: str


class Interval(NamedTuple):
    low: float
    high: float


@dataclass
class Preference:
    """The rate at which the first of two systems was preferred to the second."""

    systems: tuple[str, str]
    rate: float
    n: int
    interval: Interval | None
    interval_kind: str


@dataclass
class Strength:
    """Bradley-Terry strength of a system: of two, a wins with probability 1 / (1 + exp(b - a)); the mean is 0."""

    system: str
    strength: float
    interval: Interval | None
    rank: int


def read_json(path: str, name: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`{name}` has {path!r}, which cannot be read as JSON: {error}.") from error


def read_answers(paths: Sequence[str], key: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The judges' files, checked against the key.

    Raises:
        ValueError: a file of another study or with other content, or two files of one judge; names it.
    """
    judges: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for path in paths:
        content = read_json(path, "answers")
        try:
            study, judge = content["study"], content["judge"]
            answers = {str(a["comparison"]): {q: int(c) for q, c in a["choices"].items()} for a in content["answers"]}
            complete = all(choice in (0, 1) for choices in answers.values() for choice in choices.values())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"`answers` has {path!r}, which no page of a study has saved.") from error
        if study != key["study"]:
            raise ValueError(f"`answers` has {path!r} of the study {study}, but the key is of {key['study']}.")
        if not complete or set(answers) != set(key["comparisons"]):
            raise ValueError(f"`answers` has {path!r}, whose comparisons are not those of the key.")
        if judge in seen:
            raise ValueError(f"`answers` has two files of one judge, {seen[judge]!r} and {path!r}: keep one.")
        seen[judge] = path
        judges.append(answers)
    return judges


def attention(answers: dict[str, dict[str, int]], key: dict[str, Any]) -> float:
    """Share of the attention checks' questions that a judge answered with the photo and not the noise; 1 without any."""
    right = [
        key["comparisons"][number]["systems"][choice] is not None
        for number, choices in answers.items()
        if key["comparisons"][number]["is_check"]
        for choice in choices.values()
    ]
    return float(np.mean(right)) if right else 1.0


def collect_votes(judges: Sequence[dict[str, dict[str, int]]], key: dict[str, Any]) -> list[Vote]:
    """The answers to all comparisons but the attention checks."""
    votes = []
    for judge, answers in enumerate(judges):
        for number, choices in answers.items():
            entry = key["comparisons"][number]
            if entry["is_check"]:
                continue
            for question, choice in choices.items():
                votes.append(Vote(judge, question, entry["systems"][choice], entry["systems"][1 - choice]))
    return votes


def count_wins(votes: Sequence[Vote], systems: Sequence[str], num_judges: int) -> np.ndarray:
    """Count how often each judge preferred system i to system j, `[num_judges, S, S]`."""
    index = {system: i for i, system in enumerate(systems)}
    wins = np.zeros((num_judges, len(systems), len(systems)))
    for vote in votes:
        wins[vote.judge, index[vote.winner], index[vote.loser]] += 1
    return wins


def bradley_terry(wins: np.ndarray, num_iterations: int = 100, tolerance: float = 1e-10) -> np.ndarray:
    """
    Log-strengths `[S]` with mean 0 of a table of wins `[S, S]` (Bradley & Terry, 1952): the maximum of the likelihood by
    Newton's method, with `PSEUDO_WINS` on both sides of every pair that was compared.

    Raises:
        ValueError: some systems were never compared with the others, not even by way of a third.
    """
    compared = (wins + wins.T) > 0
    reach = np.linalg.matrix_power(compared + np.eye(len(wins)), len(wins)) > 0
    if not reach.all():
        raise ValueError(
            "`answers` do not connect all systems: some were never compared, directly or by way of others."
        )
    wins = wins + PSEUDO_WINS * compared
    games, strength = wins + wins.T, np.zeros(len(wins))
    for _ in range(num_iterations):
        odds = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
        gradient = (wins - games * odds).sum(1)
        curvature = games * odds * (1 - odds)
        # Strengths count up to a constant: the added ones hold their mean at 0.
        step = np.linalg.solve(np.diag(curvature.sum(1)) - curvature + 1 / len(wins), gradient)
        # Far from the maximum the likelihood is flat, and a whole step would go too far.
        strength = strength + np.clip(step, -1, 1)
        if np.abs(step).max() < tolerance:
            break
    return strength - strength.mean()


def wilson_interval(wins: float, n: int, z: float = 1.959964) -> Interval:
    """Wilson's 95% interval of a share (1927)."""
    share, scale = wins / n, 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / scale
    return Interval(middle - half, middle + half)


def resampled_wins(wins: np.ndarray, num_samples: int, seed: int = 0) -> np.ndarray:
    """Tables of wins of resampled judges, `[num_samples, S, S]`; none for too few judges."""
    if len(wins) < MIN_GROUPS:
        return np.empty((0, *wins.shape[1:]))
    chosen = np.random.default_rng(seed).integers(len(wins), size=(num_samples, len(wins)))
    return np.stack([wins[judges].sum(0) for judges in chosen]) if num_samples else np.empty((0, *wins.shape[1:]))


def preferences(wins: np.ndarray, systems: Sequence[str], num_samples: int) -> list[Preference]:
    """Preference rates of all pairs that were compared."""
    total, samples = wins.sum(0), resampled_wins(wins, num_samples)
    results = []
    for i, j in itertools.combinations(range(len(systems)), 2):
        n = int(total[i, j] + total[j, i])
        if n == 0:
            continue
        games = samples[:, i, j] + samples[:, j, i]
        rates = samples[games > 0, i, j] / games[games > 0]
        bounds = percentile_interval(rates, len(wins))
        interval = Interval(*bounds) if bounds is not None else wilson_interval(total[i, j], n)
        kind = "bootstrap over judges" if bounds is not None else "Wilson, answers taken for independent"
        results.append(Preference((systems[i], systems[j]), total[i, j] / n, n, interval, kind))
    return results


def ranking(wins: np.ndarray, systems: Sequence[str], num_samples: int) -> list[Strength]:
    """The systems from the strongest to the weakest."""
    strengths = bradley_terry(wins.sum(0))
    samples = []
    for table in resampled_wins(wins, num_samples):
        # A resample may lack the only judges who compared two systems.
        try:
            samples.append(bradley_terry(table))
        except ValueError:
            continue
    order = np.argsort(-strengths)
    results = []
    for rank, i in enumerate(order.tolist()):
        bounds = percentile_interval(np.array([sample[i] for sample in samples]), len(wins))
        interval = None if bounds is None else Interval(*bounds)
        results.append(Strength(systems[i], float(strengths[i]), interval, rank + 1))
    return results


def analyze(
    key: dict[str, Any], judges: Sequence[dict[str, Any]], min_attention: float, num_samples: int
) -> dict[str, Any]:
    """
    The results of a study.

    Raises:
        ValueError: no judge passed the attention checks.
    """
    attentive = [answers for answers in judges if attention(answers, key) >= min_attention]
    if not attentive:
        raise ValueError(f"`min_attention` {min_attention} is passed by none of {len(judges)} judges.")
    votes = collect_votes(attentive, key)
    systems = sorted({vote.winner for vote in votes} | {vote.loser for vote in votes})
    results: dict[str, Any] = {
        "study": key["study"],
        "judges": len(attentive),
        "judges_left_out": len(judges) - len(attentive),
        "min_attention": min_attention,
        "questions": {},
    }
    for question in sorted({vote.question for vote in votes}):
        wins = count_wins([vote for vote in votes if vote.question == question], systems, len(attentive))
        results["questions"][question] = {
            "preferences": [asdict(p) for p in preferences(wins, systems, num_samples)],
            "ranking": [asdict(s) for s in ranking(wins, systems, num_samples)],
        }
    return results


def _bounds(interval: Sequence[float] | None) -> str:
    return "" if interval is None else " [{:.2f}, {:.2f}]".format(*interval)


def make_report(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    left_out = f"{results['judges_left_out']} more failed the attention checks"
    lines = ["# User study", "", f"{results['judges']} judges; {left_out}. Intervals are 95%.", ""]
    for question, result in results["questions"].items():
        lines += [
            f"## {question.capitalize()}",
            "",
            "| | preferred to | rate | answers | interval |",
            "| - | - | - | - | - |",
        ]
        for p in result["preferences"]:
            rate = f"{p['rate']:.2f}{_bounds(p['interval'])}"
            lines.append(f"| {p['systems'][0]} | {p['systems'][1]} | {rate} | {p['n']} | {p['interval_kind']} |")
        lines += ["", "| rank | system | Bradley-Terry strength |", "| - | - | - |"]
        for s in result["ranking"]:
            lines.append(f"| {s['rank']} | {s['system']} | {s['strength']:.2f}{_bounds(s['interval'])} |")
        lines.append("")
    return "\n".join(lines)


def main(args: AnalysisArguments) -> dict[str, Any]:
    """Writes and returns the results."""
    if not 0 <= args.min_attention <= 1:
        raise ValueError(f"`min_attention` must be in [0, 1], but got {args.min_attention}.")
    if args.num_bootstrap_samples < 0:
        raise ValueError(f"`num_bootstrap_samples` must be at least 0, but got {args.num_bootstrap_samples}.")
    key = read_json(args.key, "key")
    if not isinstance(key, dict) or not {"study", "comparisons"} <= set(key):
        raise ValueError(f"`key` must be what make_user_study.py wrote, but {args.key!r} is not.")
    results = analyze(key, read_answers(args.answers, key), args.min_attention, args.num_bootstrap_samples)
    write_text(json.dumps(results, indent=2) + "\n", Path(args.output_dir) / "results.json")
    write_text(make_report(results), Path(args.output_dir) / "results.md")
    return results


def run() -> None:
    """The command line: what is wrong with the input is one line on stderr and exit code 2."""
    with user_errors(__file__):
        args = parse_arguments(AnalysisArguments, __doc__)
        main(args)
    print(Path(args.output_dir) / "results.md")


if __name__ == "__main__":
    with stoppable(__file__):
        run()
