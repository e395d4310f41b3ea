"""Commands of a study: python -m benchmarks.study [--plan NAME] teacher | cells | run | page."""

import argparse
import logging
from pathlib import Path

from benchmarks.process import silence_libraries
from benchmarks.study.listing import listing, problems
from benchmarks.study.page import write_page
from benchmarks.study.plan import MAIN_PLAN, STUDY_TEACHER, plan_names, read_plan, setting_recipe
from benchmarks.study.results import Results, results_file
from benchmarks.study.running import WORK, Study
from benchmarks.study.teacher import Documents, TeacherSettings, timed
from flexkd.display.log import set_up_logging


def main() -> None:
    """Run one of the commands."""
    arguments = _arguments()
    silence_libraries()
    set_up_logging()
    logging.getLogger("flexkd").setLevel(logging.WARNING)
    logging.getLogger("benchmarks").handlers = logging.getLogger("flexkd").handlers
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    plan = read_plan(arguments.plan)
    file = arguments.results or results_file(plan.name)
    if arguments.command == "teacher":
        recipes = {name: setting_recipe(plan, name, entry.search_mismatch) for name, entry in plan.settings.items()}
        name = next(name for name, recipe in recipes.items() if recipe.teacher.model == STUDY_TEACHER)
        if arguments.try_steps:
            documents = Documents.of(recipes[name])
            print(timed(TeacherSettings(), documents, arguments.try_steps))
        else:
            print(Study(plan, file).describe_setting(name))
    elif arguments.command == "cells":
        print(listing(plan, Results.read(file)))
        if arguments.check:
            print("\n".join(problems(plan, WORK)) or "Every recipe passes the checks of flexkd.")
    elif arguments.command == "run":
        study = Study(plan, file)
        finished = study.run(minutes=arguments.minutes, settings=arguments.setting)
        missing = study.missing(arguments.setting)
        print(f"{len(finished)} students finished, {len(missing)} left.")
    else:
        for path in write_page(plan, Results.read(file), file.parent):
            print(path)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    parser.add_argument("--plan", choices=plan_names(), default=MAIN_PLAN, help="which study")
    parser.add_argument("--results", type=Path, help="the file of results, if not that of the plan")
    commands = parser.add_subparsers(dest="command", required=True)
    teacher = commands.add_parser("teacher", help="train the small teacher, once, and say what it can do")
    teacher.add_argument("--try-steps", type=int, help="only time this many steps, and say how long the training takes")
    listed = commands.add_parser("cells", help="the list of students, and what they cost")
    listed.add_argument("--check", action="store_true", help="check every recipe as flexkd check does")
    run = commands.add_parser("run", help="run missing students; safe to kill, and to start twice at once")
    run.add_argument("--minutes", type=float, help="stop before this much time has passed")
    run.add_argument("--setting", action="append", default=[], help="only this setting; may be repeated")
    commands.add_parser("page", help="write the page and its plots")
    return parser.parse_args()


if __name__ == "__main__":
    main()
