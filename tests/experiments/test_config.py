"""Every file of conf/ composes; every setting that cannot work is refused in one line; the run id follows the numbers.

The refusals here happen before a weight is loaded; two go through the real command line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from experiments.config import CONF, ROOT, compose_config, load_config, parse, resolve
from experiments.run import run
from lora_ga.errors import SetupError
from lora_ga.records import LATER, LATER_GRADIENT, content_hash

TINY = ["model=llama_tiny", "task=movies"]
GROUPS = {
    "experiment": 7,
    "eval": 1,
    "launcher": 7,
    "logger": 2,
    "method": 15,
    "method/steps": 4,
    "model": 6,
    "protocol": 4,
    "scale": 2,
    "task": 20,
    "train": 2,
}


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def files():
    return [
        (str(path.parent.relative_to(CONF)), path.stem)
        for path in sorted(CONF.rglob("*.yaml"))
        if path.parent != CONF and path.relative_to(CONF).parts[0] not in ("hydra", "slurm")  # no settings of a run
    ]


@pytest.fixture(scope="module")
def plain():
    return load_config(TINY)


# Every file


def test_nothing_of_conf_is_left_out():
    found = files()
    assert len(found) >= 49
    assert {group for group, _ in found} == set(GROUPS)
    for group, least in GROUPS.items():
        assert len(choices(group)) >= least, group


@pytest.mark.parametrize(("group", "choice"), [pair for pair in files() if pair[0] != "experiment"])
def test_every_choice_composes_and_parses(group, choice):
    config = load_config([f"{group}={choice}"])
    assert config.run_id and config.resolved
    if "/" not in group and "name" in config.resolved[group]:
        assert config.resolved[group]["name"] == choice  # tables show the name


@pytest.mark.parametrize("scale", choices("scale"))
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes_at_the_scales_it_names(experiment, scale):
    table = resolve(compose_config([f"experiment={experiment}", f"scale={scale}"], "sweep"))["experiment"]
    if scale not in table:
        pytest.skip(f"{experiment} has no {scale} scale")
    assert table["name"] == experiment
    assert set(table[scale]) - {"notes", "scored_under", "search"} == {"seeds", "overrides", "tasks", "methods"}
    assert set(table[scale]["tasks"]) <= set(choices("task"))
    assert set(table[scale]["methods"]) <= set(choices("method"))
    settings = table[scale]["overrides"]
    for task in table[scale]["tasks"]:
        chosen = [f"scale={scale}", f"task={task}", *settings]
        ordered = sorted(chosen, key=lambda override: "." in override.partition("=")[0])
        config = load_config(ordered)
        assert config.prompt.template


@pytest.mark.parametrize("protocol", choices("protocol"))
@pytest.mark.parametrize("task", choices("task"))
def test_every_protocol_has_a_prompt_for_every_task(protocol, task):
    config = load_config(["model=llama_tiny", f"task={task}", f"protocol={protocol}"])
    assert re.findall(r"\{\w+\}", config.prompt.template)
    if config.task.kind == "generation":
        assert re.findall(r"\{\w+\}", config.prompt.target) and not config.prompt.labels
    else:
        assert len(set(config.prompt.labels)) == len(config.prompt.labels) >= 2
        assert not config.prompt.template.endswith(" ")


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_an_experiment_file_says_what_it_reproduces_how_and_at_what_cost(experiment):
    head = re.match(r"(#[^\n]*\n)+", (CONF / "experiment" / f"{experiment}.yaml").read_text())[0].lower()
    for word in ("python -m experiments", "make reproduce"):
        if word in head:
            break
    else:
        pytest.fail("no command")
    assert "published" in head


# What is refused


def refusal(overrides):
    with pytest.raises(SetupError) as caught:
        run(load_config(overrides))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("overrides", "mentions"),
    [
        (["train.max_stepz=3"], "max_stepz"),
        (["+train.max_stepz=3"], "max_steps"),  # hydra adds it, our types do not know it and say what is near
        (["+eval.splitt=test"], "split"),
        (["+model.dtyp=float32"], "dtype"),
        (["+method.rank=4"], "rank"),
        (["+method.steps.beta=0.9"], "beta"),
        (["nonsense=1"], "nonsense"),
        (["+expport=true"], "export"),
        (["method=lora_gaga"], "lora_gaga"),
        (["task=imdb"], "imdb"),
        (["protocol=mine"], "mine"),
        (["method/steps=sgd"], "sgd"),
        (["train.learning_rate=fast"], "train.learning_rate=fast"),
        (["method.r=eight"], "method.r=eight"),
        (["train.global_batch_size=16.5"], "global_batch_size"),
        (["seeds.data=abc"], "seeds.data=abc"),
        (["seed=abc"], "abc"),
        (["export=perhaps"], "export=perhaps"),
        (["records=null"], "records"),
        (["eval.split=dev"], "eval.split"),
        (["eval.limit=0"], "eval.limit=0"),
        (["eval.limit=-5"], "eval.limit=-5"),
        (["eval.batch_size=0"], "eval.batch_size=0"),
        (["train.gradient.batches=0"], "train.gradient.batches=0"),
        (["train.gradient.batch_size=-1"], "train.gradient.batch_size=-1"),
        (["task.max_length=0"], "task.max_length=0"),
        (["task.sizes.train=0"], "train"),
        (["task.sizes.train=1000000"], "train"),
        (["task.sizes.test=0"], "test"),
        (["train.max_steps=-1"], "train.max_steps=-1"),
        (["train.alignment_every=0"], "train.alignment_every=0"),
        (["train.gradient.passes=3"], "train.gradient.passes=3"),
        (["train.gradient.mode=guess"], "train.gradient.mode=guess"),
        (["train.gradient.rows_at_once=0"], "train.gradient.rows_at_once=0"),
        (["train.alignment_every=4", "method=dora"], "alignment_every"),
        (["train.alignment_every=4", "method=adalora"], "alignment_every"),
        (["train.alignment_every=4", "train.compile=true"], "set one of them off"),
        (["train.compile=true", "launcher=ddp", "launcher.nproc=2"], "under launcher=ddp"),
        (["train.global_batch_size=10", "train.per_device_train_batch_size=4"], "divisor"),
        (["train.autocast=float16"], "bfloat16"),
        (["model=t5_tiny", "model.dtype=float16"], "model.dtype=bfloat16"),
        (["model.dtype=float8"], "float8"),
        (["method.r=1000"], "method.r=1000"),
        (["method=lora_ga", "method.r=20"], "use r <= 16"),
        (["method=lora_ga", "method.use_dora=true"], "use_dora=false"),
        (["method=pissa", "method.use_dora=true"], "use_dora=false"),
        (["method._target_=os.path.join"], "_target_"),
        (["method._target_=nowhere.Lora"], "_target_"),
        (["~protocol.prompts.movies"], "task=movies"),
        (["protocol.prompts.movies.labels=[one]"], "label"),
        (["protocol.prompts.movies.template='{nothing}'"], "nothing"),
        (["model=t5_base", "model.revision=null"], "model.revision"),
        (["model=t5_base", "model.source=./no/such/folder"], "no such folder"),
        (["model.target_modules=[query]"], "query"),
        (["model.target_modules=[]"], "target_modules"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_that_names_it(overrides, mentions, tmp_path):
    places = [f"records={tmp_path}/records", f"outputs={tmp_path}/outputs"]
    places = [place for place in places if place.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    own_model = any(override.startswith("model=") for override in overrides)
    assert mentions in refusal([*(TINY[1:] if own_model else TINY), *places, *overrides])
    assert not list(tmp_path.iterdir())


def test_a_missing_mirror_file_is_named(tmp_path):
    (tmp_path / "SST-2").mkdir()
    message = refusal(["model=llama_tiny", "task=sst2", f"task.data_root={tmp_path}", f"records={tmp_path}/records"])
    assert "dev.tsv" in message and "is missing" in message
    message = refusal(["model=llama_tiny", "task=sst2", f"task.data_root={tmp_path}/nowhere"])
    assert "nowhere" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [["train.max_stepz=3"], ["model=t5_tiny", "model.dtype=float16"]], ids=lambda value: value[-1]
)
def test_the_command_line_ends_with_code_2_and_one_line(overrides, tmp_path):
    before = set(ROOT.iterdir())
    answer = subprocess.run(
        [sys.executable, "-m", "experiments.run", *overrides, f"records={tmp_path}/r", f"outputs={tmp_path}/o"],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1 and answer.stderr.startswith("error: ")
    assert answer.stdout == ""
    assert not list(tmp_path.iterdir()) and set(ROOT.iterdir()) == before


# Identity


@pytest.mark.parametrize(
    "override",
    [
        "method=rslora",
        "method.r=4",
        "method/steps=lora_pro",
        "train.learning_rate=3e-4",
        "train.max_steps=7",
        "train.autocast=null",
        "train.gradient.batches=2",
        "train.alignment_every=4",  # its record holds more
        "train.compile=true",  # other rounding
        "train.gradient.mode=incremental",
        "train.gradient.rows_at_once=2",
        "model.dtype=bfloat16",
        "model=t5_tiny",
        "task=reply",
        "task.sizes.train=100",
        "task.max_length=64",
        "protocol=lora_ga",
        "protocol.prompts.movies.labels=[bad,good]",
        "eval.split=validation",
        "eval.limit=5",
        "seed=1",
        "seeds.data=1",
        "seeds.adapter=1",
    ],
)
def test_the_run_id_changes_with_what_changes_numbers(plain, override):
    assert load_config([*TINY, override]).run_id != plain.run_id


@pytest.mark.parametrize(
    "override",
    [
        "records=elsewhere",
        "outputs=elsewhere",
        "task.data_root=elsewhere",
        "eval.batch_size=7",
        "experiment_name=other",
        "export=true",
        "logger=wandb",
        "protocol.prompts.reply.template='{question} {sentence}'",  # another task's prompt
        "seed=0",
    ],
)
def test_the_run_id_stays_with_what_does_not(plain, override):
    assert load_config([*TINY, override]).run_id == plain.run_id


def test_the_run_id_is_the_same_in_every_process_and_order(plain):
    other = load_config(["task=movies", "seed=0", "model=llama_tiny"])
    assert other.run_id == plain.run_id
    shuffled = {key: plain.resolved[key] for key in reversed(list(plain.resolved))}
    assert parse(shuffled).run_id == plain.run_id
    assert re.fullmatch(r"[0-9a-f]{12}", plain.run_id)


def test_keys_that_came_later_are_no_part_of_a_run_that_does_not_use_them(plain):
    train = plain.resolved["train"]
    gradient = {key: train["gradient"][key] for key in ("batch_size", "batches", "dropout", "cache")}
    older = {key: value for key, value in train.items() if key not in LATER} | {"gradient": gradient}
    assert set(LATER) | set(LATER_GRADIENT) == (set(train) - set(older)) | (set(train["gradient"]) - set(gradient))
    part = {**plain._trained_part, "train": older}
    assert content_hash(part) == plain.train_id


def test_the_protocol_hash_is_that_of_the_whole_protocol(plain):
    assert load_config([*TINY, "protocol=lora_ga"]).protocol_hash != plain.protocol_hash
    assert load_config([*TINY, "task.max_length=64", "seed=4"]).protocol_hash == plain.protocol_hash
    other = load_config([*TINY, "protocol.prompts.reply.template='{question} {sentence}'"])
    assert other.protocol_hash != plain.protocol_hash


def test_three_seeds_follow_one_and_can_part(plain):
    assert (plain.seeds.data, plain.seeds.adapter, plain.seeds.generation) == (0, 0, 0)
    moved = load_config([*TINY, "seed=3"]).seeds
    assert (moved.data, moved.adapter, moved.generation) == (3, 3, 3)
    apart = load_config([*TINY, "seed=3", "seeds.data=5"]).seeds
    assert (apart.data, apart.adapter, apart.generation) == (5, 3, 3)


def test_types_are_what_the_code_expects(plain):
    """A tuple stays one and 1e-4 is a number, whatever YAML makes of it."""
    assert isinstance(plain.model.target_modules, tuple)
    assert load_config([*TINY, "train.learning_rate=1e-4"]).train.learning_rate == 1e-4
    assert plain.method.steps.betas == (0.9, 0.999)
    assert plain.records_folder == ROOT / "results" / "runs" / "adhoc-local"
