"""The results as a table for people, and as JSON for later."""

from __future__ import annotations

import json
import os
import platform
import ssl
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from bench.measures import MIB, Sample
from bench.plan import GoalResult, Result
from bench.serving import CHECKOUT

_MET = {True: "met", False: "NOT MET", None: ""}


def table(result: Result) -> str:
    """A benchmark: a line for each variant, then one for each goal."""
    lines = [f"{result.case.name}: {result.case.measures}  [{result.seconds:.0f} s]"]
    width = max([len(name) for name in result.samples], default=0)
    heads = ("seconds", "min", "max", "rate", "CPU s", "server CPU s", "peak MiB")
    lines.append("  " + " " * width + "".join(f"{head:>13}" for head in heads))
    for name, samples in result.samples.items():
        if samples:
            lines.append(
                f"  {name:<{width}}" + "".join(f"{cell:>13}" for cell in _cells(samples)) + _counted(samples)
            )
    lines += [f"  {_goal(judged)}" for judged in result.goals]
    if result.error:
        lines.append(f"  FAILED: {result.error}")
    return "\n".join(lines)


def _cells(samples: list[Sample]) -> list[str]:
    seconds = [sample.seconds for sample in samples]
    return [
        _number(median(seconds)),
        _number(min(seconds)),
        _number(max(seconds)),
        _rate(samples),
        _middle(samples, lambda sample: sample.cpu),
        _middle(samples, lambda sample: sample.server_cpu),
        f"{max(sample.peak for sample in samples if sample.peak) / MIB:.0f}"
        if any(s.peak for s in samples)
        else "",
    ]


def _rate(samples: list[Sample]) -> str:
    rate = median(sample.rate for sample in samples)
    if not rate:
        return ""
    return f"{rate:.0f} /s" if samples[0].operations else f"{rate / MIB:.0f} MiB/s"


def _middle(samples: list[Sample], of: Callable[[Sample], float | None]) -> str:
    values = [value for value in map(of, samples) if value is not None]
    return _number(median(values)) if values else ""


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}" if value >= 0.05 else f"{value:.6f}"


def _counted(samples: list[Sample]) -> str:
    names = dict.fromkeys(name for sample in samples for name in sample.counts)
    shown = (f"{name} {median(s.counts[name] for s in samples if name in s.counts):.4g}" for name in names)
    return "  " + ", ".join(shown) if names else ""


def _goal(judged: GoalResult) -> str:
    goal = judged.goal
    if judged.median is None:
        found = "not measured"
    else:
        found = f"{judged.median:.3g} ({min(judged.ratios):.3g} … {max(judged.ratios):.3g})"
    wanted = "" if goal.target is None else f", goal {'≥' if goal.at_least else '≤'} {goal.target:g}"
    return f"→ {goal.text}: {found}{wanted}  {_MET[judged.met]}".rstrip()


def summary(results: list[Result]) -> str:
    judged = [goal for result in results for goal in result.goals]
    missed = [(r, goal) for r in results for goal in r.goals if goal.met is False]
    failed = [result.case.name for result in results if result.error]
    lines = [f"{sum(goal.met is True for goal in judged)} goals met, {len(missed)} not"]
    lines += [f"  not met: {result.case.name} {_goal(goal)}" for result, goal in missed]
    lines += [f"  failed: {name}" for name in failed]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model[0].partition(":")[2].strip() if model else "",
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "root": os.geteuid() == 0,
    }


def _commit() -> str:
    """What was measured; empty where git is not installed, or this is not a clone."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def as_json(results: list[Result], about: dict[str, Any]) -> str:
    return json.dumps({"machine": about, "results": [_plain(result) for result in results]}, indent=1)


def _plain(result: Result) -> dict[str, Any]:
    return {
        "name": result.case.name,
        "measures": result.case.measures,
        "error": result.error,
        "seconds": result.seconds,
        "samples": {name: [asdict(sample) for sample in samples] for name, samples in result.samples.items()},
        "goals": [
            {
                "text": judged.goal.text,
                "target": judged.goal.target,
                "at_least": judged.goal.at_least,
                "ratios": judged.ratios,
                "met": judged.met,
            }
            for judged in result.goals
        ],
    }
