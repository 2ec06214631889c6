"""Tests of training: a killed run continues exactly, and two processes compute the same as one."""

import argparse
import dataclasses
import json
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from paths import ROOT
from processes import children, command_of, gone, wait_until
from runs import EXIT, JOINT, command, curve, parsed, recipe_file, sums, train
from small_disk import small_disk
from small_model import SMALL

from deer_vla_ros.commands import train_command
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.training.batches import FrameBatches, Share
from deer_vla_ros.lab.training.dataset import window_rows
from deer_vla_ros.lab.training.frames import Frames
from deer_vla_ros.lab.training.optimisation import Stage
from deer_vla_ros.lab.training.recipe import Recipe, Train
from deer_vla_ros.lab.training.tokenizer import train_tokenizer
from deer_vla_ros.lab.training.trainer import Progress, StageState, Trainer, TrainingLog, read_log
from deer_vla_ros.model.checkpoint import load, set_thresholds
from deer_vla_ros.model.config import PRESETS
from deer_vla_ros.model.network import MultiExitVLA


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return *train(recipe_file(folder, JOINT, EXIT), folder / "out", data), sums(folder / "out")


def test_both_stages_lower_their_loss_and_only_the_heads_move_in_the_second(undisturbed, data, tmp_path):
    log, weights, _ = undisturbed
    for stage in ("stage-1-joint", "stage-2-exit"):
        losses = [line["loss"] for line in log if line["stage"] == stage]
        quarter = len(losses) // 4
        assert np.mean(losses[-quarter:]) < 0.9 * np.mean(losses[:quarter]), losses
    _, after_joint = train(recipe_file(tmp_path, JOINT), tmp_path / "out", data)
    for name, value in after_joint.items():
        is_head = name.startswith(("shared_head.", "last_head.", "auxiliary_heads."))
        assert is_head or torch.equal(value, weights[name]), name


def test_a_run_that_is_killed_and_repeated_leaves_the_same_files_to_the_byte(undisturbed, data, tmp_path):
    config, log = recipe_file(tmp_path, JOINT, EXIT), tmp_path / "out" / "small" / "log.jsonl"
    for lines in (5, 16):  # in the middle of either stage
        running = subprocess.Popen(
            command(config, tmp_path / "out", data), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while running.poll() is None and len(read_log(log)) < lines and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
    resumed, _ = train(config, tmp_path / "out", data)
    assert curve(resumed) == curve(undisturbed[0])
    assert sums(tmp_path / "out") == undisturbed[2]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
def test_a_run_that_is_killed_four_times_at_random_leaves_the_same_files(seed, undisturbed, data, tmp_path):
    config, out, draw = recipe_file(tmp_path, JOINT, EXIT), tmp_path / "out", random.Random(seed)
    log, last = out / "small" / "log.jsonl", len(undisturbed[0]) - 1
    for lines in sorted(draw.sample(range(1, last), 4)):
        running = subprocess.Popen(command(config, out, data), stdout=subprocess.DEVNULL)
        wait_until(
            lambda run=running, least=lines: run.poll() is not None or len(read_log(log)) >= least,
            120,
            f"{lines} lines of the log",
        )
        time.sleep(draw.uniform(0.0, 0.1))
        running.kill()
        running.wait()
    train(config, out, data)
    assert sums(out) == undisturbed[2]


def test_a_log_on_a_full_disk_says_so_and_does_not_wait(tmp_path):
    log = TrainingLog(tmp_path, "stage-1-joint", 0)
    told = r"tensorboard/stage-1-joint cannot be written .* are free there"
    with small_disk(2**13), pytest.raises(UserError, match=told):
        for step in range(1, 1000):
            log.add(Progress(step, 1.0, {}, 1.0, 1.0, 1.0, 1.0))


@pytest.mark.long
def test_a_recorder_ends_with_the_training_that_was_killed(tmp_path):
    config = recipe_file(tmp_path, JOINT)
    values = yaml.safe_load(config.read_text())
    config.write_text(
        yaml.safe_dump(
            {**values, "steps": [{"record": {"folder": "many", "demos": 6400, "seed": 1}}, *values["steps"]]}
        )
    )
    running = subprocess.Popen(
        command(config, tmp_path / "out", tmp_path / "data"), stdout=subprocess.DEVNULL
    )
    try:
        recorder = wait_until(
            lambda: next((pid for pid in children(running.pid) if "record-demos" in command_of(pid)), None),
            60,
            "a recorder",
        )
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    wait_until(lambda: gone(recorder), 60, "its end")


@pytest.mark.long
def test_two_processes_compute_what_one_does(data, tmp_path):
    (one, weights), (two, others) = (
        train(recipe_file(tmp_path, JOINT, EXIT), tmp_path / f"of-{count}", data, count) for count in (1, 2)
    )
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=2e-4), name


def test_a_step_tells_which_share_of_it_went_by_without_a_batch(data, tmp_path, monkeypatch):
    frames, config, now = Frames([data / "demos"]), PRESETS["tabletop"](4), [0.0]
    tokenizer = train_tokenizer(frames.all_phrasings(), config)
    source = FrameBatches(frames, tokenizer, count=8, instructions=2, seed=0)

    def passes(seconds):
        now[0] += seconds

    class FromASlowDisk:
        def batch(self, step, micro, share):
            passes(3)
            return source.batch(step, micro, share)

    monkeypatch.setattr("deer_vla_ros.lab.training.trainer.time.perf_counter", lambda: now[0])
    model = MultiExitVLA(config)
    model.vision.register_forward_hook(lambda *_: passes(1))
    train = Train(Stage.JOINT, ("demos",), 1, 8, instructions=2, window=1, accumulate=2, pool_padding=False)
    trainer = Trainer(model, train, FromASlowDisk(), tokenizer.image_token, 0, StageState(tmp_path, {}))
    assert trainer.step().waited == 0.75


@pytest.mark.parametrize("guide", ["heatmap", "point", "turn"])
def test_each_guide_teaches_without_the_others(guide, data, tmp_path):
    stage = {**JOINT, "steps": 2, "heatmap": 0.0, "point": 0.0, "turn": 0.0}
    (without, _), (with_it, weights) = (
        train(recipe_file(tmp_path, {**stage, guide: weight}), tmp_path / f"{weight}", data)
        for weight in (0.0, 0.5)
    )
    assert guide not in without[0]["parts"]
    added = 0.5 * with_it[0]["parts"][guide]
    assert with_it[0]["loss"] == pytest.approx(without[0]["loss"] + added, rel=1e-5) and added > 0


def test_micro_batches_add_up_to_the_whole_batch(data, tmp_path):
    frames = Frames([data / "demos"])
    config = PRESETS["tabletop"](4)
    tokenizer = train_tokenizer(frames.all_phrasings(), config)
    source = FrameBatches(frames, tokenizer, count=8, instructions=2, seed=0)

    class Halves:
        def batch(self, step, micro, share):
            return source.batch(step, 0, Share(micro, 2))

    outcomes = []
    for micro_batches, batches in ((1, source), (2, Halves())):
        torch.manual_seed(0)
        model = MultiExitVLA(config)
        # Every micro-batch draws exits of its own: here all read the last.
        train = Train(
            Stage.JOINT, ("demos",), 3, 8, instructions=2, window=1, warmup_steps=0, random_exits=False,
            accumulate=micro_batches, heatmap=0.2, pool_padding=False,
        )  # fmt: skip
        trainer = Trainer(
            model, train, batches, tokenizer.image_token, 0, StageState(tmp_path / f"{micro_batches}", {})
        )
        outcomes.append(([trainer.step() for _ in range(3)], model.state_dict()))
    (whole, weights), (parts, others) = outcomes
    assert [step.loss for step in parts] == pytest.approx([step.loss for step in whole], rel=1e-5)
    assert [step.gradient_norm for step in parts] == pytest.approx(
        [step.gradient_norm for step in whole], rel=1e-4
    )
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-4), name


def test_a_stage_of_another_recipe_is_refused_and_left_as_it_was(data, tmp_path):
    train(recipe_file(tmp_path, {**JOINT, "steps": 2}), tmp_path / "out", data)
    state = tmp_path / "out" / "small" / "stage-1-joint" / "state.safetensors"
    before = state.read_bytes()
    with pytest.raises(
        UserError,
        match=r"stage-1-joint was trained with step 1 turn 0.2, the recipe now says 0.3: give another --out",
    ):
        train_command.run(
            parsed(recipe_file(tmp_path, {**JOINT, "steps": 2, "turn": 0.3}), tmp_path / "out", data)
        )
    assert state.read_bytes() == before


def test_a_finished_run_repeated_keeps_the_thresholds_that_its_checkpoint_got(data, tmp_path):
    config, checkpoint = (
        recipe_file(tmp_path, {**JOINT, "steps": 2}),
        tmp_path / "out" / "small" / "checkpoint",
    )
    log, _ = train(config, tmp_path / "out", data)
    thresholds = tuple(0.1 for _ in load(checkpoint).info.thresholds)
    set_thresholds(checkpoint, thresholds)
    again, _ = train(config, tmp_path / "out", data)
    assert load(checkpoint).info.thresholds == thresholds and curve(again) == curve(log)


def test_a_frame_is_shown_with_its_own_task_first_and_only_with_tasks_that_make_sense(data):
    frames = Frames([data / "demos"])
    config = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocabulary=512))
    tokenizer = train_tokenizer(frames.all_phrasings(), config)
    source = FrameBatches(frames, tokenizer, count=16, instructions=3, seed=0)
    whole = source.batch(7, 0, Share())
    again = source.batch(7, 0, Share())
    halves = [source.batch(7, 0, Share(rank, 2)) for rank in range(2)]
    assert torch.equal(whole.ids, again.ids) and torch.equal(whole.images, again.images)
    assert torch.equal(whole.ids, torch.cat([half.ids for half in halves]))
    assert torch.equal(whole.targets.pose, torch.cat([half.targets.pose for half in halves]))
    assert (
        whole.images.shape == (16, 2, 3, 64, 64) and whole.ids.shape[0] == 48 and whole.points.shape[0] == 16
    )
    with pytest.raises(UserError, match="does not divide among 3"):
        source.batch(0, 0, Share(0, 3))


def test_what_seldom_makes_sense_is_asked_for_most_where_it_does(data):
    frames = Frames([data / "demos"])
    config = dataclasses.replace(SMALL, decoder=dataclasses.replace(SMALL.decoder, vocabulary=512))
    tokenizer = train_tokenizer(frames.all_phrasings(), config)
    frames.valid[:] = [True, True, True]
    frames.valid[frames.episode > 0, 2] = False  # "wait" in the first episode only
    frames.task[:] = 0
    batches = [
        FrameBatches(frames, tokenizer, count=512, instructions=2, seed=0).batch(step, 0, Share())
        for step in range(4)
    ]
    others = [tuple(ids.tolist()) for batch in batches for ids in batch.ids[1::2]]
    waits = others.count(tuple(tokenizer.encode(frames.all_phrasings())[0][-1].tolist()))
    share = (frames.episode == 0).mean()
    assert waits / len(others) == pytest.approx(share / (1 + share), abs=0.04), (
        "before a task that always makes sense, 1 to its share"
    )


def test_windows_end_where_their_episode_ends():
    episode = np.array([0, 0, 0, 1, 1])
    rows, valid = window_rows(episode, np.array([0, 1, 3, 4]), 3)
    assert rows.tolist() == [[0, 1, 2], [1, 2, 2], [3, 4, 4], [4, 4, 4]]
    assert valid.tolist() == [[True] * 3, [True, True, False], [True, True, False], [True, False, False]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": {"preset": "no_such", "layers": 4}}, "preset is 'no_such'"),
        ({"steps": [{"train": {**JOINT, "window": 4}}]}, "window 1"),
        ({"steps": [{"train": {**EXIT, "stage": "joint"}}]}, "cache needs the exit stage"),
        ({"steps": [{"train": {**JOINT, "batch": 9, "accumulate": 2}}]}, "does not divide"),
        ({"steps": [{"train": {**JOINT, "colour": 1}}]}, "unknown keys \\['colour'\\]"),
        ({"steps": [{"train": {**JOINT, "stage": "third"}}]}, "use one of joint, exit"),
        ({"steps": [{"cook": {}}]}, "give one of `record:` and `train:`"),
        ({"steps": 3}, "no list of steps"),
        (
            {"steps": [{"record": {"folder": "d", "demos": 1, "seed": 1, "with_policy": True}}]},
            "there is no policy yet",
        ),
        ({"log_every": 0}, "log_every is 0: give 1 or more"),
        ({"save_every": 0}, "save_every is 0"),
        ({"evaluate_every": -1}, "evaluate_every is -1: give 0 or more"),
        ({"steps": [{"train": {**JOINT, "schedule": "cosine", "steps": 2}}]}, "give more steps in total"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        Recipe.read(recipe_file(tmp_path, JOINT, **change)).network.config()


def test_the_recipes_that_ship_can_be_read():
    folder = ROOT / "config" / "training"
    recipes = [Recipe.read(path) for path in sorted(folder.glob("*.yaml"))]
    assert len(recipes) >= 4
    for recipe in recipes:
        assert recipe.network.config().exits
        json.dumps(recipe.network.config().to_dict())


def test_an_early_evaluation_asks_for_the_network_as_it_is(data, tmp_path, monkeypatch):
    """This test checks the arguments of the command `evaluate`; another one tests what it measures."""
    from deer_vla_ros.commands import evaluate_command
    from deer_vla_ros.lab.training.training_run import TrainingRun

    asked = []
    monkeypatch.setattr(
        TrainingRun, "_other_command", lambda self, arguments: asked.append(list(map(str, arguments)))
    )
    recipe = recipe_file(tmp_path, {**JOINT, "steps": 4}, evaluate_every=2)
    train(recipe, tmp_path, data)
    assert len(asked) == 2
    for arguments in asked:
        assert arguments[0] == "evaluate"
        parser = argparse.ArgumentParser()
        evaluate_command.add_arguments(parser)
        args = parser.parse_args(arguments[1:])
        evaluate_command.asked_for(args)
        assert load(Path(args.checkpoint)).info.trained and args.trials > 0 and args.full_depth
    first, second = (load(Path(arguments[arguments.index("--checkpoint") + 1])).model for arguments in asked)
    assert any((one != other).any() for one, other in zip(first.parameters(), second.parameters())), (
        "it trained in between"
    )
