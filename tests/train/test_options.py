"""Bad options get one clear line and exit code 2."""

from typing import Any

import pytest

from fused_resnet import cli
from fused_resnet.train.errors import OptionError
from fused_resnet.train.options import TrainOptions, plain, resumed

GOOD = ["--model", "resnet18", "--data", "digits"]

# What is typed, and a word or two that the answer must contain.
BAD: dict[str, tuple[list[str], str]] = {
    "no model": (["--data", "digits"], "--model is missing"),
    "no data": (["--model", "resnet18"], "--data is missing"),
    "unknown option": ([*GOOD, "--learning-rate", "1"], "--learning-rate"),
    "shortened option": ([*GOOD, "--epoch", "1"], "--epoch"),
    "no number": ([*GOOD, "--epochs", "many"], "--epochs"),
    "no whole number": ([*GOOD, "--batch-size", "1.5"], "--batch-size"),
    "zero epochs": ([*GOOD, "--epochs", "0"], "--epochs 0: must be greater than 0"),
    "negative batch": ([*GOOD, "--batch-size", "-4"], "--batch-size -4: must be greater than 0"),
    "zero rate": ([*GOOD, "--lr", "0"], "--lr 0.0: must be greater than 0"),
    "rate not a number": ([*GOOD, "--lr", "nan"], "--lr nan: must be a finite number"),
    "infinite rate": ([*GOOD, "--lr", "inf"], "--lr inf: must be a finite number"),
    "momentum of one": ([*GOOD, "--momentum", "1"], "--momentum 1.0: must be less than 1"),
    "smoothing of one": ([*GOOD, "--label-smoothing", "1"], "--label-smoothing 1.0: must be less than 1"),
    "negative decay": ([*GOOD, "--weight-decay", "-1"], "--weight-decay -1.0: must be at least 0"),
    "unknown schedule": ([*GOOD, "--schedule", "linear"], "linear"),
    "milestones of cosine": ([*GOOD, "--milestones", "3"], "--milestones are of --schedule step"),
    "milestones falling": ([*GOOD, "--schedule", "step", "--milestones", "9,3"], "must rise"),
    "milestones too late": ([*GOOD, "--schedule", "step", "--milestones", "30"], "between 0 and --epochs 30"),
    "milestones of words": ([*GOOD, "--schedule", "step", "--milestones", "a,b"], "must be epochs"),
    "warm-up too long": ([*GOOD, "--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs 3: must be less than"),
    "crop of more than all": ([*GOOD, "--min-scale", "1.5"], "--min-scale 1.5: must be at most 1"),
    "no test images": ([*GOOD, "--test-fraction", "0"], "--test-fraction 0.0: must be greater than 0"),
    "nesterov without momentum": ([*GOOD, "--nesterov", "--momentum", "0"], "--nesterov needs"),
    "unknown network": (["--model", "resnet51", "--data", "digits"], "did you mean resnet"),
    "network without its family": (["--model", "resnet20", "--data", "digits"], "did you mean cifar.resnet20?"),
    "something hidden as network": (["--model", "__init__", "--data", "digits"], "unknown"),
    "no folder": (["--model", "resnet18", "--data", "/nowhere/at/all"], "no such folder"),
    "batch larger than the data": ([*GOOD, "--size", "8", "--batch-size", "9999"], "--batch-size 9999: more than the"),
    "unknown device": ([*GOOD, "--device", "gpu"], "--device gpu: must be auto, cpu, cuda or cuda:N"),
    "device without a number": ([*GOOD, "--device", "cuda:"], "--device cuda:: must be auto"),
    "device of a negative number": ([*GOOD, "--device", "cuda:-1"], "--device cuda:-1: must be auto"),
    "two kinds of autocast": ([*GOOD, "--bf16", "--fp16", "--device", "cuda"], "--fp16: not together with --bf16"),
    "fp16 on the CPU": ([*GOOD, "--fp16", "--device", "cpu"], "--fp16: on a GPU only"),
    "zero threads": ([*GOOD, "--threads", "0"], "--threads 0: must be greater than 0"),
}


@pytest.mark.parametrize("label", BAD)
def test_one_line_and_exit_code_2(label: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    pytest.importorskip("sklearn")
    arguments, words = BAD[label]
    try:
        code = cli.main(["train", *arguments, "--out", str(tmp_path / "run")])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("fused-resnet train: ")
    assert out == ""
    assert not (tmp_path / "run").exists()


def test_defaults_are_valid_and_plain() -> None:
    options = TrainOptions(model="resnet18", data="x")
    assert TrainOptions(**plain(options)) == options
    assert options.image_size() == 224
    assert TrainOptions(model="cifar.resnet20", data="x").image_size() == 32
    assert TrainOptions(model="preact.cifar_preresnet110", data="x").image_size() == 32
    assert TrainOptions(model="cifar.resnet20", data="x", size=48).image_size() == 48


def test_every_option_reaches_the_run() -> None:
    line = (
        "--model m --data d --out o --epochs 7 --batch-size 3 --lr 0.5 --momentum 0.8 --nesterov --weight-decay 0.01 "
        "--label-smoothing 0.2 --schedule step --milestones 2,4.5 --gamma 0.3 --warmup-epochs 0.5 --bf16 "
        "--no-channels-last --stock --size 40 --shift 1 --no-flip --min-scale 0.5 --test-fraction 0.3 --skip-broken "
        "--seed 5 --device cpu --threads 1 --workers 4 --checkpoint-every 9 --tensorboard --quiet"
    )
    parsed = cli._parser().parse_args(["train", *line.split()])
    options = TrainOptions(**cli.given(parsed))
    defaults = TrainOptions(model="?", data="?")
    unchanged = [name for name, value in plain(options).items() if value == getattr(defaults, name)]
    assert unchanged == ["fp16"]  # not together with --bf16
    line = line.replace("--bf16", "--fp16").replace("--device cpu", "--device cuda:1")
    options = TrainOptions(**cli.given(cli._parser().parse_args(["train", *line.split()])))
    assert (options.fp16, options.bf16, options.device) == (True, False, "cuda:1")
    assert options.milestone_epochs() == (2, 4.5)


def test_resuming_keeps_what_was_begun() -> None:
    saved = plain(TrainOptions(model="resnet18", data="x", lr=0.3))
    assert resumed(saved, {"lr": 0.3, "workers": 7}).workers == 7
    assert resumed(saved, {}).lr == 0.3
    with pytest.raises(OptionError, match=r"--lr 0.2: the run to resume was started with 0.3"):
        resumed(saved, {"lr": 0.2})
