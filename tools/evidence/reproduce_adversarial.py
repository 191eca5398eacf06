"""The adversarial part of tools/reproduce.py: the paper's tables in miniature on real CIFAR-10 images.

Each training is one of configs/mmpretrain/cifar10_miniature, run by mmpretrain's own script. What has a result is not
run again, so an interrupted reproduction goes on; what is told comes from the results alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evidence import reproduce_adversarial_plan as plan
from evidence import reproduce_jobs
from demo.report import write_text
from evidence.reproduce_adversarial_report import FIGURES, draw, render

__all__ = ["reproduce"]


def reproduce(
    folder: Path,
    results: Path,
    *,
    quick: bool,
    processes: int,
    threads: int,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """Runs what has no result yet, and writes what was found.

    Args:
        folder: of the jobs.
        results: gets adversarial.json, adversarial.md and the pictures.
        quick: the same with a few images, to see that it works; the numbers mean nothing.
        processes: how many jobs run at once.
        threads: of each.
        report: told in a line what begins, ends and fails.

    Returns:
        The files that were written.

    Raises:
        ValueError: the data is missing, or the folder holds jobs of other settings.
        RuntimeError: a job failed; the others were finished first.
    """
    data = reproduce_jobs.data_checksum()
    budget = plan.QUICK if quick else plan.FULL

    def sources(job: reproduce_jobs.Job) -> dict[str, str]:
        return {"config": plan.config_checksum(job.settings["config"]), "data": data}

    def run(jobs: Sequence[reproduce_jobs.Job]) -> dict[str, dict[str, Any]]:
        return reproduce_jobs.run_jobs(
            jobs, folder, processes=processes, threads=threads, sources=sources, report=report
        )

    found = run(plan.search_jobs(budget))
    scales = plan.choose_scales(budget, found)
    main, further = plan.main_jobs(budget, scales), plan.further_jobs(budget, scales)
    followed = plan.followed_jobs(budget)
    for jobs in (
        main["trainings"],
        [*main["pgd"], *main["radii"], plan.check_job(budget, scales)],
        main["autoattack"],
        plan.ablation_jobs(budget),
        followed["trainings"],
        followed["followed"],
        further["trainings"],
        [*further["pgd"], *further["prior"]],
    ):
        found |= run(jobs)
    content = {
        "quick": quick,
        "budget": budget._asdict(),
        "scales": scales,
        "threads": threads,
        "data": reproduce_jobs.read_json(reproduce_jobs.data_folder() / "manifest.json"),
        "jobs": found,
    }
    results.mkdir(parents=True, exist_ok=True)
    reproduce_jobs.write_json(results / "adversarial.json", content)
    write_text(results / "adversarial.md", render(content))
    draw(content, results)
    return [results / name for name in ("adversarial.json", "adversarial.md", *FIGURES)]
